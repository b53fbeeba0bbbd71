"""How an engine updates, and the same in DeepSpeed's words."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

STAGES = (0, 1, 2, 3)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_BUCKET = 500_000_000  # elements that DeepSpeed reduces at a time, as is its default


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """The options of `fastgrpo.engine.zero.Engine`; those of AdamW have torch's names and meaning."""

    zero_stage: int
    """What is split over the ranks: 0 to 3, see the table of `fastgrpo.engine.zero`."""
    dtype: torch.dtype
    """The type that the policy computes in. float32 leaves the policy as it is, also a frozen base of lower precision."""
    learning_rate: float
    """The learning rate until `Engine.set_learning_rate` sets another."""
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-4
    adam_eps: float = 1e-8
    max_grad_norm: float = 1.0
    """The norm to which the gradient of all ranks is clipped; 0 does not clip."""
    micro_batch_size: int = 1
    """Samples in a micro-batch. DeepSpeed wants to know it for its statistics; nothing depends on it."""
    zero_options: Mapping[str, Any] = field(default_factory=dict)
    """More keys of DeepSpeed's section `zero_optimization`."""

    def check(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Raises ValueError for what would not train the parameters as this package says."""
        if self.zero_stage not in STAGES:
            raise ValueError(f"zero_stage {self.zero_stage} is unknown; use 0, 1, 2 or 3")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype} is not for training; use float32, bfloat16 or, on CUDA, float16")
        if self.dtype == torch.float16 and not torch.cuda.is_available():
            raise ValueError("dtype float16 needs CUDA; on a CPU use float32 or bfloat16")
        if self.dtype != torch.float32 and self.zero_stage == 0:
            # Its masters are made by a step of AdamW on zero gradients: one weight decay and one count too many.
            raise ValueError(f"zero_stage 0 with {self.dtype} is not plain AdamW in DeepSpeed; use 1, or float32")
        if not trained:
            raise ValueError("no parameter of the policy requires a gradient; add an adapter or unfreeze some")
        for name, p in trained.items():
            if self.dtype == torch.float32 and p.dtype != torch.float32:
                raise ValueError(
                    f"{name} is trained in {p.dtype}, which float32 training would step without float32 masters; "
                    f"make it float32, or set dtype to {p.dtype}"
                )

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.AdamW:
        return torch.optim.AdamW(
            parameters, lr=self.learning_rate, betas=self.betas, weight_decay=self.weight_decay, eps=self.adam_eps
        )

    def deepspeed_config(self, parameters: list[nn.Parameter]) -> dict[str, Any]:
        """DeepSpeed's configuration for training these parameters."""
        return {
            "train_micro_batch_size_per_gpu": self.micro_batch_size,
            "gradient_accumulation_steps": 1,  # `Engine.backward` is told which micro-batch is the last
            "gradient_clipping": self.max_grad_norm if self.zero_stage > 0 else 0.0,
            "bf16": {"enabled": self.dtype == torch.bfloat16},
            # A transition's gradient of SD3.5-M at 512 px, measured on an H200 against float32: at DeepSpeed's 2^16, 55% of
            # its entries are lost to 0 (cosine 0.958); at 2^24, 8% (0.999998), and the largest is 0.27, where float16 ends
            # at 65504. DeepSpeed doubles the scale only after 1000 updates without an overflow, so it would stay too low. A
            # scale that is too high is halved by an overflow, whose update is skipped: with hysteresis 1 by the first
            # already, where DeepSpeed's default of 2 would skip one more update at the same scale.
            "fp16": {"enabled": self.dtype == torch.float16, "initial_scale_power": 24, "hysteresis": 1},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
            # By default DeepSpeed times every forward pass from the third update on, and waits for the device before each:
            # in rollouts too, which then run only as fast as the host can launch, and whose capture as a graph it would end.
            "timers": {"throughput": {"enabled": False}},
            "zero_optimization": {
                "stage": self.zero_stage,
                # DeepSpeed allocates a whole bucket, by default of 5e8 elements.
                "reduce_bucket_size": min(sum(p.numel() for p in parameters), LARGEST_BUCKET),
                # Stage 3 would replace torch's linear in the whole process, also for encoders and rewards.
                "memory_efficient_linear": False,
                **self.zero_options,
            },
        }
