"""Parameter counts by part."""

from collections.abc import Mapping

from torch import nn

PARTS = ("vision experts", "language experts", "fusion experts", "attention", "embeddings", "norms", "heads")


def part_of(name: str) -> str:
    """Part of the model that a parameter belongs to, by its name."""
    if ".ffn.vision." in name:
        return "vision experts"
    if ".ffn.language." in name:
        return "language experts"
    if ".ffn.fusion." in name:
        return "fusion experts"
    if ".attention." in name:
        return "attention"
    if "vision_embed." in name or "text_embed." in name:
        return "embeddings"
    return "norms" if "norm." in name and "heads." not in f".{name}" else "heads"


def parameter_parts(model: nn.Module, heads: Mapping[str, nn.Module]) -> dict[str, int]:
    """Parameters of each part, with their ``total``; counts a model on the meta device as well."""
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        counts[part_of(name)] += parameter.numel()
    counts["heads"] += sum(p.numel() for head in heads.values() for p in head.parameters())
    return counts | {"total": sum(counts.values())}
