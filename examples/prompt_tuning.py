"""Prompt tuning (Lester et al. 2021): eight trained inputs before the words turn a merry story into a sad one.

    python examples/prompt_tuning.py

The model's weights stay as they are, and on the servers; what is trained, 2,048 numbers, is here.
"""

from __future__ import annotations

import torch

import petalite
from together import batch, fairytale, language_loss, options, show_loss

SAD = [
    "The princess went into the garden, and the night was dark and cold, and nobody came, and she wept alone.",
    "One day the king's son was dead, and they laid him in the grave, and the rain fell upon the cold stones.",
    "In the village the wind howled, and the house was empty, and all that she had loved was gone for ever.",
    "A great sorrow came upon the land, and the flowers died, and the people wept in the dark streets.",
]
OPENING = "The king and the queen"


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--save", metavar="DIR", help="write the prompt there, in PEFT's format")
    arguments = parser.parse_args()
    with fairytale(arguments.peer) as model:
        torch.manual_seed(0)
        prompt = petalite.PromptTuning(model.config, 8)
        optimizer = torch.optim.Adam(prompt.parameters(), lr=0.02)
        ids, mask = batch(model, SAD)
        first = 0.0
        for step in range(arguments.steps):
            loss = language_loss(model.logits(ids, mask=mask, soft_prompt=prompt), ids, mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            first = first or float(loss.detach())
            if step % 5 == 0 or step == arguments.steps - 1:
                show_loss(step, float(loss.detach()), first)
        print("\nbefore:", OPENING + model.generate_text(OPENING, max_new_tokens=30))
        print("\nafter: ", OPENING + model.generate_text(OPENING, max_new_tokens=30, soft_prompt=prompt))
        if arguments.save:
            prompt.save(arguments.save, "fairytale")


if __name__ == "__main__":
    main()
