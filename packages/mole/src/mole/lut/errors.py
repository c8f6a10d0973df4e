"""What can be wrong with a lookup table. All are `ValueError`s that name what was found."""


class LutError(ValueError):
    """A lookup table cannot be used."""


class LutVersionError(LutError):
    """`lut.json` is no description of a table, or of a version this package does not read."""


class LutTruncatedError(LutError):
    """A file of the table is missing or has the wrong length."""


class LutChecksumError(LutError):
    """The bytes of a chunk are not those that were written."""


class LutFingerprintError(LutError):
    """The table was made from other weights."""


class LutShapeError(LutError):
    """The table's vocabulary, layers, experts or width are not the model's."""


class LutIdError(LutError):
    """A token id is not in the table."""


__all__ = [
    "LutChecksumError",
    "LutError",
    "LutFingerprintError",
    "LutIdError",
    "LutShapeError",
    "LutTruncatedError",
    "LutVersionError",
]
