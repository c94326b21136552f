"""Conversations for the warm start: games in which the first try is right, or has two letters changed places.

    python examples/verifiers_multiturn/warm_start.py outputs/verifiers/games.jsonl

The words have another seed than the environment's tasks. Supervised learning copies the mistakes as well as the way out
of them, so the adapter that comes of it plays the game and plays it badly: there is something left for RL.
"""

from __future__ import annotations

import json
import random
import string
import sys
from pathlib import Path

GAMES = 4000


def game(rng: random.Random) -> list[dict[str, str]]:
    word = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(4, 7)))
    answer = word[::-1]
    messages = [{"role": "user", "content": f"reverse: {word}"}]
    for _ in range(rng.choice([0, 1])):
        wrong = swapped(answer, rng)
        right = sum(a == b for a, b in zip(wrong, answer, strict=True))
        messages += [{"role": "assistant", "content": wrong}, {"role": "user", "content": f"{right} right: {word}"}]
    return [*messages, {"role": "assistant", "content": answer}]


def swapped(answer: str, rng: random.Random) -> str:
    letters = list(answer)
    i = rng.randrange(len(letters) - 1)
    letters[i], letters[i + 1] = letters[i + 1], letters[i]
    return "".join(letters)


def main() -> None:
    rng, path = random.Random("warm start"), Path(sys.argv[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"messages": game(rng)}) + "\n" for _ in range(GAMES)), encoding="utf-8")
    print(f"wrote {path}: {GAMES} games")


if __name__ == "__main__":
    main()
