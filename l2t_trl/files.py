"""Writing files so that a reader never sees half of one."""

import os
import tempfile
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """
    Write a file whole or not at all; one that is replaced hands on its permissions.

    Args:
        path (`Path`): the file.
        content (`str` or `bytes`): all that it is to hold; text in UTF-8.

    Raises:
        OSError: if it cannot be written. What was there before is left as it was, and nothing is left beside it.
    """
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o644
    with tempfile.NamedTemporaryFile("wb", dir=path.parent, delete=False) as file:
        try:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, mode)
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
