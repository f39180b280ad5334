"""What a GPU could do at most, computed and not measured: bytes against bandwidth, products against arithmetic.

python -m benchmarks.roofline       AFT-conv in bfloat16 on an H100 (SXM): 3.35 TB/s, 989 TFLOP/s
"""

from __future__ import annotations

import torch

from model import AFTConfig, AFTForCausalLM

BANDWIDTH, FLOPS, BYTES_PER_WEIGHT = 3.35e12, 989e12, 2
SHAPES = {
    "110 M": AFTConfig(variant="conv", vocab_size=32_000, d_model=768, n_layer=12, n_head=12),
    "7 B": AFTConfig(variant="conv", vocab_size=32_000, d_model=4096, n_layer=34, n_head=32),
}
BATCH_SIZES = (1, 8, 32, 128, 256, 1024)


def tokens_per_second(config: AFTConfig, batch_size: int) -> tuple[float, str]:
    """Tokens per second, and what limits them. A step reads weights and states once, and writes the running sums."""
    with torch.device("meta"):
        model = AFTForCausalLM(config)
        state = model.init_state(batch_size)
    written = sum(tensor.nbytes for layer in state.layers for tensor in layer[:3])
    memory = (model.num_parameters * BYTES_PER_WEIGHT + state.nbytes + written) / BANDWIDTH
    arithmetic = 2 * model.num_parameters * batch_size / FLOPS
    return batch_size / max(memory, arithmetic), "memory" if memory > arithmetic else "arithmetic"


def main() -> None:
    print("| batch | " + " | ".join(SHAPES) + " |\n|---" + "|---" * len(SHAPES) + "|")
    for batch_size in BATCH_SIZES:
        cells = ["{:,.0f} ({})".format(*tokens_per_second(config, batch_size)) for config in SHAPES.values()]
        print(f"| {batch_size:,} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
