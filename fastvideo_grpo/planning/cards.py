"""What GPUs can do, by their makers' datasheets (dense, no sparsity), and what one was measured to do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        key: what it is called on a command line.
        name: as its datasheet has it.
        matches: what its name in torch begins with, without "NVIDIA".
        peak: precision -> floating-point operations a second. bf16: of tensor cores, sums in float32; fp32: without TF32, which
            runs leave off.
        memory: bytes.
        link: bytes a second that it sends to GPUs of its machine while it receives as many: NVLink, or PCIe where it has none.
        ceiling: precision -> operations a second of large matrix products, where they were measured (docs/performance.md).
    """

    key: str
    name: str
    matches: tuple[str, ...]
    peak: dict[str, float]
    memory: float
    link: float
    ceiling: dict[str, float]


_T, _G = 1e12, 1e9

CARDS = (
    Card("h200", "H200 SXM", ("H200",), {"bf16": 989.4 * _T, "fp32": 66.9 * _T}, 141 * _G, 450 * _G, {"bf16": 795 * _T}),
    Card("h100", "H100 SXM", ("H100 80GB HBM3",), {"bf16": 989.4 * _T, "fp32": 66.9 * _T}, 80 * _G, 450 * _G, {}),
    Card("h100-pcie", "H100 PCIe", ("H100 PCIe",), {"bf16": 756 * _T, "fp32": 51.2 * _T}, 80 * _G, 64 * _G, {}),
    Card("a100", "A100 SXM 80 GB", ("A100-SXM4-80GB",), {"bf16": 312 * _T, "fp32": 19.5 * _T}, 80 * _G, 300 * _G, {}),
    Card("l40s", "L40S", ("L40S",), {"bf16": 362 * _T, "fp32": 91.6 * _T}, 48 * _G, 32 * _G, {}),
    Card("4090", "GeForce RTX 4090", ("GeForce RTX 4090",), {"bf16": 165.2 * _T, "fp32": 82.6 * _T}, 24 * _G, 32 * _G, {}),
)


def find_card(torch_name: str) -> Card | None:
    """The card of ``torch.cuda.get_device_name()``; None: it is not in the table."""
    name = torch_name.removeprefix("NVIDIA ")
    return next((card for card in CARDS if any(name == match or name.startswith(f"{match} ") for match in card.matches)), None)


def card_of(key: str) -> Card:
    """The card of this key.

    Raises:
        KeyError: there is none.
    """
    return {card.key: card for card in CARDS}[key]
