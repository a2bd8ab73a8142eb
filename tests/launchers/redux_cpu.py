"""training/trainner_redux_cpu.py for tests: losses without downloads, several processes, a dump.

python redux_cpu.py train -opt X.yml [--auto_resume] [--launcher pytorch] [--dump FOLDER]
"""

from __future__ import annotations

import sys

import cpu


def main() -> None:
    task = sys.argv.pop(1)
    cpu.prepare()
    script = cpu.load(task)
    cpu.run(script, getattr(script, f"{task}_pipeline"))


if __name__ == "__main__":
    main()
