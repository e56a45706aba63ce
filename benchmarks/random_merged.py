"""A merged folder with random weights of a chosen size and an untrained selector (scope always, criticality reserved).

    python benchmarks/random_merged.py --hidden 512 --layers 8 --out runs/random      # then benchmarks/vllm.py --random

For the speed of a server alone: what it writes means nothing. The output layer is scaled so that the likeliest token has a lead,
as that of a trained model has; else every candidate might win at every trigger.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from s2t.config import MergeConfig
from s2t.merge import merge
from s2t.model.adapter import AdapterConfig, SelectorAdapter
from s2t.model.load import load_model
from s2t.model.tiny import embedded_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--peak", type=float, default=4.0, help="factor on the output layer")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()

    out = Path(args.out)
    base, adapter = out.with_name(f"{out.name}.base"), out.with_name(f"{out.name}.adapter")
    config = Qwen2Config(
        vocab_size=1024,
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 128),
        max_position_embeddings=1024,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.weight, std=args.peak / args.hidden**0.5)
    model.save_pretrained(base)
    AutoTokenizer.from_pretrained(str(embedded_path("tiny:slm"))).save_pretrained(base)
    shutil.copy(Path(embedded_path("tiny:slm")) / "generation_config.json", base)
    loaded = load_model(str(base))
    fresh = AdapterConfig(str(base), loaded.fingerprint, scope="always", criticality="reserved")
    SelectorAdapter(loaded, fresh).save(adapter)
    merge(MergeConfig(adapter=str(adapter), out=str(out), overwrite=True))
    print(f"{out}: {sum(weight.numel() for weight in model.parameters()) / 1e6:.0f} M parameters")


if __name__ == "__main__":
    main()
