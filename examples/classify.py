"""A classifier on the last hidden state, trained through the swarm: is a sentence merry or sad?

    python examples/classify.py

A linear head and a soft prompt of four positions are trained; gradients of the prompt come back through the servers.
"""

from __future__ import annotations

import torch

import petalite
from together import batch, fairytale, options, show_loss

MERRY = [
    "They laughed and danced all night long.",
    "The children sang a merry song in the sunshine.",
    "There was great joy at the wedding feast.",
    "She smiled and kissed her mother happily.",
    "The boy jumped for joy and clapped his hands.",
    "Everybody was glad and the bells rang gaily.",
    "He found the gold and lived happily ever after.",
    "The bird sang sweetly among the flowers.",
]
SAD = [
    "They wept bitterly beside the grave.",
    "The poor child was cold and hungry and alone.",
    "There was great sorrow in the dark castle.",
    "She cried and could not be comforted.",
    "The old man died and nobody mourned him.",
    "Everybody was afraid and the night was black.",
    "He lost his way and perished in the snow.",
    "The bird lay dead among the withered leaves.",
]
UNSEEN = [
    ("The king was merry and danced with his bride.", "merry"),
    ("The princess was happy and laughed aloud.", "merry"),
    ("The children played gaily in the garden.", "merry"),
    ("The widow wept for her dead son.", "sad"),
    ("He was hungry and cold, and tears ran down.", "sad"),
    ("They buried her in the dark, cold ground.", "sad"),
]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    with fairytale(arguments.peer) as model:
        torch.manual_seed(1)
        prompt = petalite.PromptTuning(model.config, 4)
        classifier = petalite.SequenceClassifier(model.config, ["merry", "sad"])
        optimizer = torch.optim.Adam([*classifier.parameters(), *prompt.parameters()], lr=0.003)
        ids, mask = batch(model, MERRY + SAD)
        due = torch.tensor([0] * len(MERRY) + [1] * len(SAD))
        first = 0.0
        for step in range(arguments.steps):
            scores = classifier(model, ids, mask=mask, soft_prompt=prompt)
            loss = torch.nn.functional.cross_entropy(scores, due)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            first = first or float(loss.detach())
            if step % 5 == 0 or step == arguments.steps - 1:
                show_loss(step, float(loss.detach()), first)
        ids, mask = batch(model, [text for text, _ in UNSEEN])
        with torch.no_grad():
            chances = classifier(model, ids, mask=mask, soft_prompt=prompt).softmax(dim=-1)
    print()
    right = 0
    for (text, name), row in zip(UNSEEN, chances, strict=True):
        found = classifier.classes[int(row.argmax())]
        right += found == name
        print(f"{found:>5} ({float(row.max()):.2f})  {text}")
    print(f"\n{right} of {len(UNSEEN)} sentences that it had not seen are right")


if __name__ == "__main__":
    main()
