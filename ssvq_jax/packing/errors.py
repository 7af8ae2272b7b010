"""What is raised for a file that is not what it should be."""


class PackedFileError(ValueError):
    """A packed file is damaged, of another kind or version, or does not fit what it is used for."""
