"""The training command, and a list of every path that this process opens to write or gives a name: writes-RANK.txt.

For tests of several processes: `python -m torch.distributed.run --nproc_per_node 2 -m tests.fakes.audited_training`.
The list lies in the folder that the variable K5_AUDIT names.
"""

from __future__ import annotations

import os
import sys
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def main() -> int:
    rank = os.environ.get("RANK", "0")
    descriptor = os.open(
        os.path.join(os.environ["K5_AUDIT"], f"writes-{rank}.txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644
    )

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
            written = arguments[0]
        elif event == "os.rename":
            written = arguments[1]
        else:
            return
        if isinstance(written, str | os.PathLike):
            os.write(descriptor, f"{os.path.abspath(os.fspath(written))}\n".encode())

    sys.addaudithook(note)
    from backend.kandinsky5_train_network import main as train

    return train()


if __name__ == "__main__":
    raise SystemExit(main())
