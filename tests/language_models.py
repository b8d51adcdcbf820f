"""Small language models of transformers, from their configurations alone, and dictionary batches for them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

WORDS = 40
CONTEXT = 16


def transformer(name: str, labels: int = 3, layers: int = 2, seed: int = 0) -> nn.Module:
    """A network of transformers' class `name` with random weights, in evaluation mode."""
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {
        "hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 48,
        "max_position_embeddings": CONTEXT,
    }  # fmt: skip
    if name.startswith("GPT2"):
        sizes = {"n_embd": 32, "n_layer": layers, "n_head": 2, "n_positions": CONTEXT, "n_inner": 48}
    config = transformers.AutoConfig.for_model(
        "gpt2" if name.startswith("GPT2") else "llama" if name.startswith("Llama") else "bert",
        vocab_size=WORDS, num_labels=labels, bos_token_id=0, eos_token_id=0, pad_token_id=0, **sizes,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = getattr(transformers, name)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)  # transformers' own start is so small that all predictions are alike
    return model.eval()


def token_batches(*sizes: int, length: int = 8, labels: str | None = None, seed: int = 0) -> list[dict[str, Tensor]]:
    """Batches of word numbers with masks, the first sample padded on the right.

    `labels` are classes of the "sequence", of each "token" with some left out, or the words themselves ("causal").
    """
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for size in sizes:
        words = torch.randint(1, WORDS, (size, length), generator=generator)
        mask = torch.ones_like(words)
        mask[0, -3:] = 0
        batch = {"input_ids": words * mask, "attention_mask": mask}
        if labels == "sequence":
            batch["labels"] = words[:, 0] % 3
        elif labels == "token":
            batch["labels"] = (words % 3).masked_fill(words % 5 == 0, -100)
        elif labels == "causal":
            batch["labels"] = words.masked_fill(mask == 0, -100)
        batches.append(batch)
    return batches
