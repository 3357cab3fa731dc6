"""What a client trains while the model's own weights stay as they are: soft prompts, LoRA adapters, a classifier.

All are ordinary torch modules that hold the trained parameters and nothing else; the servers never keep them.
"""

from petalite.client.tuning.classifier import SequenceClassifier
from petalite.client.tuning.forward import Differentiable, adapter_options, hidden_states
from petalite.client.tuning.lora import LoraAdapter
from petalite.client.tuning.prompts import PromptTuning

__all__ = [
    "Differentiable",
    "LoraAdapter",
    "PromptTuning",
    "SequenceClassifier",
    "adapter_options",
    "hidden_states",
]
