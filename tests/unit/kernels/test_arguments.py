"""Validation of arguments: each error names the wrong argument and the value that it conflicts with."""

import pytest
import torch
from torch import Tensor

from infini_kernels import MemoryState, document_attention, infini_attention, local_attention
from infini_kernels.arguments import SMALLEST_EPS
from infini_train.config.validation import SMALLEST_MEMORY_EPS

B, T, H, G, D, DV, S = 2, 7, 4, 2, 4, 3, 5


def arguments() -> dict[str, object]:
    return {
        "q": torch.zeros(B, T, H, D),
        "k": torch.zeros(B, T, G, D),
        "v": torch.zeros(B, T, G, DV),
        "gate": torch.zeros(H),
        "memory": MemoryState.zeros(B, G, D, DV),
        "segment_length": S,
    }


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


REFUSALS = {
    "q of 3 dimensions": ({"q": zeros(B, T, D)}, r"q has shape \[2, 7, 4\], but 4 dimensions"),
    "no tokens": ({"q": zeros(B, 0, H, D)}, r"q has shape \[2, 0, 4, 4\], but every dimension"),
    "integers": ({"q": zeros(B, T, H, D, dtype=torch.int64)}, "q is torch.int64, but attention needs"),
    "two types": ({"k": zeros(B, T, G, D, dtype=torch.float64)}, "k is torch.float64 but q is torch.float32"),
    "two devices": ({"v": torch.zeros(B, T, G, DV, device="meta")}, "v is on meta but q is on cpu"),
    "tokens of k": ({"k": zeros(B, T + 1, G, D)}, r"k has batch and tokens \[2, 8\] but q has \[2, 7\]"),
    "heads of v": ({"v": zeros(B, T, 1, DV)}, r"v has batch, tokens and heads \[2, 7, 1\] but k has \[2, 7, 2\]"),
    "width of k": ({"k": zeros(B, T, G, D + 1)}, "k has width 5 but q has width 4"),
    "heads": (
        {"k": zeros(B, T, 3, D), "v": zeros(B, T, 3, DV)},
        "k has 3 heads but q has 4, which is not a multiple",
    ),
    "no gate": ({"gate": None}, "gate is None, but infini_attention needs one β"),
    "gate": ({"gate": zeros(3)}, r"gate has shape \[3\] but q has 4 heads"),
    "gate of integers": ({"gate": zeros(H, dtype=torch.int64)}, "gate is torch.int64"),
    "memory M": (
        {"memory": MemoryState(zeros(B, H, D, DV), zeros(B, G, D))},
        r"memory.M has shape \[2, 4, 4, 3\], but k \[2, 7, 2, 4\] and v \[2, 7, 2, 3\] need \[2, 2, 4, 3\]",
    ),
    "memory z": (
        {"memory": MemoryState(zeros(B, G, D, DV), zeros(B, G, DV))},
        r"memory.z has shape \[2, 2, 3\], but k .* need \[2, 2, 4\]",
    ),
    "memory type": (
        {"memory": MemoryState.zeros(B, G, D, DV, dtype=torch.bfloat16)},
        "memory.M is torch.bfloat16, but beside k of torch.float32 it must be torch.float32",
    ),
    "segment length": ({"segment_length": 0}, "segment_length is 0"),
    "update rule": ({"update_rule": "hebb"}, "update_rule is 'hebb', but must be one of linear, delta"),
    "first segment": ({"first_segment": "none"}, "first_segment is 'none', but must be one of paper, local_only"),
    "write gate": ({"write_gate": zeros(H, D)}, r"write_gate has shape \[4, 4\], but k \[2, 7, 2, 4\] needs \[2, 4\]"),
    "write gate of integers": ({"write_gate": zeros(G, D, dtype=torch.int64)}, "write_gate is torch.int64"),
    "normaliser": ({"normaliser": "none"}, "normaliser is 'none', but must be one of paper, corrected"),
    "normaliser of the linear rule": (
        {"normaliser": "corrected"},
        "which needs update_rule 'delta'",
    ),
    "memory of a corrected normaliser": (
        {"normaliser": "corrected", "update_rule": "delta"},
        r"memory.M has shape \[2, 2, 4, 3\], but k .* need \[2, 2, 4, 4\]",
    ),
    "feature map": ({"feature_map": "relu"}, "feature_map is 'relu', but must be one of elu, softmax"),
    "backend": ({"backend": "cuda"}, "backend is 'cuda', but must be one of auto, reference, triton"),
    "triton": ({"backend": "triton"}, "backend is 'triton', which takes CUDA tensors of float16, bfloat16 or float32"),
    "eps of zero": ({"eps": 0.0}, "eps is 0.0, but must be finite and at least"),
    "eps of NaN": ({"eps": float("nan")}, "eps is nan"),
    "reset shape": (
        {"reset": zeros(B, 3, dtype=torch.bool)},
        r"reset has shape \[2, 3\], but 2 rows of 2 segments need \[2, 2\]",
    ),
    "reset type": ({"reset": zeros(B, 2)}, "reset is torch.float32, but must be torch.bool"),
    "lengths shape": (
        {"lengths": zeros(B, 3, dtype=torch.int64)},
        r"lengths has shape \[2, 3\], but 2 rows of 2 segments need \[2\] or \[2, 2\]",
    ),
    "lengths type": ({"lengths": zeros(B)}, "lengths is torch.float32, but counts tokens"),
    "lengths of a row": ({"lengths": torch.tensor([8, 7])}, "lengths holds 8 but q has 7 tokens"),
    "negative lengths": ({"lengths": torch.tensor([-1, 7])}, "lengths holds -1"),
    "lengths of the last segment": (
        {"lengths": torch.tensor([[5, 3], [5, 2]])},
        "lengths holds 3 but segments of segment_length 5 in 7 tokens",
    ),
    "rotary positions": (
        {"rotary": (zeros(T, 2), zeros(T, 2))},
        r"rotary cos has shape \[7, 2\], but segment_length 5 and width 4 of q need \[5, 2\]",
    ),
    "rotary width": ({"rotary": (zeros(S, 2), zeros(S, 4))}, r"rotary sin has shape \[5, 4\]"),
    "rotary, odd width": (
        {"q": zeros(B, T, H, 3), "k": zeros(B, T, G, 3), "memory": None, "rotary": (zeros(S, 1), zeros(S, 1))},
        "rotary rotates halves, but q has odd width 3",
    ),
    "rotary of one table": ({"rotary": (zeros(S, 2),)}, "rotary has 1 entries, but is a pair"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_error_names_the_wrong_argument(name: str) -> None:
    changes, message = REFUSALS[name]
    with pytest.raises(ValueError, match=message):
        infini_attention(**{**arguments(), **changes})


def test_valid_arguments_are_accepted() -> None:
    infini_attention(
        **arguments(),
        rotary=(zeros(S, 2), zeros(S, 2)),
        reset=zeros(B, 2, dtype=torch.bool),
        lengths=torch.tensor([[5, 2], [0, 0]], dtype=torch.int32),
        backend="reference",
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"k": zeros(B, T, 3, D)}, "v has batch, tokens and heads"),
        ({"segment_length": -1}, "segment_length is -1"),
        ({"lengths": torch.tensor([8, 7])}, "lengths holds 8 but q has 7 tokens"),
        ({"rotary": (zeros(3, 2), zeros(3, 2))}, r"rotary cos has shape \[3, 2\]"),
    ],
)
def test_other_attentions_raise_the_same_errors(changes: dict[str, object], message: str) -> None:
    tensors = {name: x for name, x in arguments().items() if name not in ("gate", "memory")}
    with pytest.raises(ValueError, match=message):
        local_attention(**{**tensors, **changes})
    with pytest.raises(ValueError, match=message):
        document_attention(**{**tensors, "reset": None, **changes})


def test_document_attention_needs_rotary_for_every_token() -> None:
    tensors = {name: x for name, x in arguments().items() if name not in ("gate", "memory")}
    with pytest.raises(ValueError, match=r"rotary cos has shape \[5, 2\], but tokens 7 and width 4 of q need \[7, 2\]"):
        document_attention(**tensors, reset=None, rotary=(zeros(S, 2), zeros(S, 2)))


def test_smallest_epsilon_matches_the_configuration():
    assert SMALLEST_MEMORY_EPS == SMALLEST_EPS
