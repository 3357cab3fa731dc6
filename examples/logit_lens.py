"""A logit lens (nostalgebraist 2020): what the model would say next if it stopped after each of its blocks.

    python examples/logit_lens.py "Once upon a time there was a little"

The hidden states of all blocks come back from one pass through the swarm, a round trip a server; the norm and the
output head, which are here, turn each into words.
"""

from __future__ import annotations

import torch

from together import fairytale, options

SHADES = " .:-=+*#%@"
WIDTH = 11


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("text", nargs="?", default="The king and the queen had a little")
    arguments = parser.parse_args()
    with fairytale(arguments.peer) as model:
        ids = torch.tensor([model.encode(arguments.text)])
        states = model.blocks(model.embeddings(ids), output_hidden_states=True)
        with torch.no_grad():
            chances = [model.head(state[0]).softmax(dim=-1) for state in states]  # (T, vocabulary) each
    words = [model.decode([token]) for token in ids[0].tolist()]
    print("The likeliest next word after each word, by how many blocks have worked on it; ")
    print(f"the shade before it says how likely: '{SHADES[0]}' not at all, '{SHADES[-1]}' certain.\n")
    print("".join([f"{'':<9}", *(f"{word.strip()[: WIDTH - 1]:<{WIDTH}}" for word in words)]))
    for number, rows in enumerate(chances):
        cells = []
        for row in rows:
            chance, token = (float(row.max()), int(row.argmax()))
            shade = SHADES[min(len(SHADES) - 1, int(chance * len(SHADES)))]
            word = model.decode([token]).strip() or "_"
            cells.append(f"{shade}{word[: WIDTH - 2]:<{WIDTH - 1}}")
        print(f"{f'{number} blocks':<9}" + "".join(cells))


if __name__ == "__main__":
    main()
