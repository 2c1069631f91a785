"""The experts on the grouped product of MegaBlocks, an optional back-end to compare with.

Three packages hold that product, gmm(a, b, batch_sizes, trans_b), and whichever is installed is
taken, in this order: the maintained build (imported as megablocks, or from Hugging Face's kernels
package), then grouped_gemm, which the released megablocks uses itself. Nothing is downloaded.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable

import phi_kernels
import torch
from phi_kernels import DispatchPlan
from torch import Tensor
from torch.nn import functional

from moe.config import EXPERT_BACKEND_NAMES
from moe.errors import ConfigError

# (a_NK, b_EMK, batch_sizes_E of int64 on the host, trans_b=True) -> (N, M); differentiable in a, b
GroupedProduct = Callable[..., Tensor]

_HUB_NAME, _HUB_VERSION = "kernels-community/megablocks", 1
_ALTERNATIVES = ", ".join(name for name in EXPERT_BACKEND_NAMES if name != "megablocks")


def expert_mlp(
    x_TD: Tensor, weight_TK: Tensor, plan: DispatchPlan, gate_up_EHD: Tensor, down_EDF: Tensor
) -> Tensor:
    """The same as phi_kernels.reference_expert_mlp, in bfloat16 on a GPU.

    Reads the number of rows of each expert on the host: a synchronisation in every call.
    """
    product = load_grouped_product()
    if not x_TD.is_cuda or x_TD.dtype != torch.bfloat16:
        raise ConfigError(
            f"experts.backend: got 'megablocks' with {x_TD.dtype} on {x_TD.device.type}; its "
            "products take torch.bfloat16 on a GPU. Set train.precision=bfloat16 there, or choose "
            f"another back-end: {_ALTERNATIVES}"
        )
    return expert_mlp_with(product, x_TD, weight_TK, plan, gate_up_EHD, down_EDF)


def expert_mlp_with(
    product: GroupedProduct,
    x_TD: Tensor,
    weight_TK: Tensor,
    plan: DispatchPlan,
    gate_up_EHD: Tensor,
    down_EDF: Tensor,
) -> Tensor:
    """expert_mlp with a given grouped product."""
    rows_ND = phi_kernels.gather_rows(x_TD, plan)
    # syncs: the product launches one matrix product an expert from the host
    end_E = plan.offset_E.to("cpu", torch.int64)
    num_rows_E = torch.diff(end_E, prepend=end_E.new_zeros(1))
    gate_NF, up_NF = product(rows_ND, gate_up_EHD, num_rows_E, trans_b=True).chunk(2, dim=-1)
    out_ND = product(functional.silu(gate_NF) * up_NF, down_EDF, num_rows_E, trans_b=True)
    return phi_kernels.combine_rows(out_ND, weight_TK, plan)


@functools.cache
def load_grouped_product() -> GroupedProduct:
    """Return gmm of the package that is installed; ConfigError that says how to get one."""
    tried = []
    for name, find in (
        ("megablocks", _from_megablocks),
        (f"{_HUB_NAME} in Hugging Face's kernels", _from_hub_cache),
        ("grouped_gemm", _from_grouped_gemm),
    ):
        try:
            return find()
        # of compiled extensions: RuntimeError and OSError where CUDA or torch is another one
        except (ImportError, AttributeError, RuntimeError, OSError, ValueError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            tried.append(f"{name}: {reason[0]}")
    raise ConfigError(
        "experts.backend: got 'megablocks', but no build of its grouped product can be used here "
        f"({'; '.join(tried)}). It is not installed with phimoe, because the released package "
        "(megablocks 0.10) pins torch 2.7. Either install the maintained build: pip install "
        f"kernels, download {_HUB_NAME} once (kernels download, or get_kernel) and set "
        "HF_HUB_OFFLINE=1, or name a local copy: LOCAL_KERNELS="
        f"{_HUB_NAME}=/path/to/it; or make an environment with torch 2.7 and pip install "
        f"'megablocks[gg]'. Or choose another back-end: {_ALTERNATIVES}"
    )


def _from_megablocks() -> GroupedProduct:
    """The maintained build holds the product as gg_ops, the released one in grouped_gemm_util."""
    megablocks = importlib.import_module("megablocks")
    if hasattr(megablocks, "gg_ops"):
        return megablocks.gg_ops.gmm
    operations = importlib.import_module("megablocks.grouped_gemm_util").ops
    if operations is None:
        raise ImportError("installed without grouped_gemm, its extra [gg]")
    return operations.gmm


def _from_hub_cache() -> GroupedProduct:
    found = importlib.util.find_spec("kernels")
    # a folder of that name without __init__.py, such as ours, is not the package
    if found is None or found.origin is None:
        raise ImportError("No module named 'kernels'")
    hub = importlib.import_module("kernels")
    is_local = _HUB_NAME in os.environ.get("LOCAL_KERNELS", "")
    # the package's own switch, as it was when that package was imported: only then it never asks
    # the network
    if not is_local and not importlib.import_module("huggingface_hub").constants.HF_HUB_OFFLINE:
        raise ImportError("would be downloaded; with HF_HUB_OFFLINE=1 a copy on disk is used")
    return hub.get_kernel(_HUB_NAME, version=_HUB_VERSION).gg_ops.gmm


def _from_grouped_gemm() -> GroupedProduct:
    return importlib.import_module("grouped_gemm").ops.gmm
