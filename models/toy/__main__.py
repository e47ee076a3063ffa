"""Captions of the toy world, one a line: prompts for `python sample.py --prompts`.

Use     python -m models.toy --scenes 3072 > prompts.txt     # those of align.py
"""

from dataclasses import dataclass

from models import script, toy


@dataclass(frozen=True)
class Config:
    scenes: int = 3072  # captions to print
    held_out: bool = True  # include what the tasks called held out ask for
    uncolored: float = 0.2  # share of captions without colours


def main() -> None:
    config = script.parse_config(Config, __doc__)
    print("\n".join(toy.prompts_of_all(config.scenes, config.held_out, config.uncolored)))


if __name__ == "__main__":
    script.exit_cleanly(main)
