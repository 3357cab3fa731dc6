"""LoRA (Hu et al. 2021) on a few lines: the model learns a rhyme by heart.

    python examples/lora.py

The low-rank weights are here and travel with each request; servers keep nothing of them. `--save` writes them in PEFT's
format: `PeftModel.from_pretrained` puts them on a local BLOOM, `petalite serve --adapter NAME=DIR` on a server.
"""

from __future__ import annotations

import torch

import petalite
from together import batch, fairytale, language_loss, options, show_loss

RHYME = [
    "The sea was wet as wet could be, the sands were dry as dry.",
    "You could not see a cloud, because no cloud was in the sky.",
    "No birds were flying overhead, there were no birds to fly.",
]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--save", metavar="DIR", help="write the adapter there, in PEFT's format")
    arguments = parser.parse_args()
    with fairytale(arguments.peer) as model:
        torch.manual_seed(0)
        adapter = petalite.LoraAdapter(model.config, rank=4, alpha=8, targets=["query_key_value", "dense_4h_to_h"])
        optimizer = torch.optim.Adam(adapter.parameters(), lr=0.01)
        ids, mask = batch(model, RHYME)
        first = 0.0
        for step in range(arguments.steps):
            loss = language_loss(model.logits(ids, mask=mask, adapter=adapter), ids, mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            first = first or float(loss.detach())
            if step % 5 == 0 or step == arguments.steps - 1:
                show_loss(step, float(loss.detach()), first)
        opening = "The sea was"
        print("\nbefore:", opening + model.generate_text(opening, max_new_tokens=14))
        print("after: ", opening + model.generate_text(opening, max_new_tokens=14, adapter=adapter))
        if arguments.save:
            adapter.save(arguments.save, "fairytale")


if __name__ == "__main__":
    main()
