"""Captions of the toy world, one a line: prompts for `python sample.py --prompts`.

Use     python -m models.toy --scenes 3072 > prompts.txt
"""

from dataclasses import dataclass

from models import script, toy


@dataclass(frozen=True)
class Config:
    scenes: int = 3072  # captions to print
    held_out: bool = True  # include the concepts that rendered post-training scenes leave out
    uncolored: float = 0.2  # share of captions without colours; 0.6 in rendered scenes


def main() -> None:
    config = script.parse_config(Config, __doc__)
    scenes = toy.draw_scenes(config.scenes, seed=1, held_out=config.held_out)
    print("\n".join(toy.captions(scenes, 1, config.held_out, config.uncolored)))


if __name__ == "__main__":
    script.exit_cleanly(main)
