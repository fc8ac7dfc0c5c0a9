"""The law of odd files: each is read, or refused in one line with its code."""

import pytest

from volseg.errors import ScanError
from volseg.io.volumes import read_header, read_volume


def read_or_refused(path, code):
    """Return the volume if `code` is None or a warning; None if the file is refused with `code`."""
    if code is not None and code.startswith("E_"):
        with pytest.raises(ScanError) as caught:
            read_volume(path)
        assert caught.value.code == code
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)
        assert caught.value.fix and caught.value.exit_code == 4
        return None
    volume = read_volume(path)
    codes = [warning.code for warning in read_header(path).warnings]
    assert codes == ([] if code is None else [code])
    return volume
