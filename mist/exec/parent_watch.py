"""A process that another one started ends with it, however that one ends. Torch-free.

The starting process makes a temporary folder for what both of them exchange, and removes it at its
end. Where it was killed, those that it started remove the folder.
"""

import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Final

PREFIX: Final = "mist-"  # of the names of temporary folders


def leave_with_parent(folder: Path) -> None:
    """End this process when the parent's end of standard input closes: none is orphaned.

    `folder`: the temporary one of the parent, which goes with it.
    """

    def watch() -> None:
        os.read(0, 1)  # nothing is ever written: this returns at the end
        remove_temporary(folder)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def remove_temporary(folder: Path) -> None:
    """Remove a temporary folder of Mist's. Its name comes from outside: another one stays."""
    if folder.name.startswith(PREFIX) and folder.parent == Path(tempfile.gettempdir()):
        shutil.rmtree(folder, ignore_errors=True)
