"""Write a checkpoint of random weights, of the size that you name: for trying export, check and bench without a trained model.

    python examples/random_checkpoint.py build/random-1b --layers 20
    bilevel export build/random-1b build/random-1b-bundle
    bilevel check build/random-1b-bundle --against build/random-1b --tokens 512

The default is a Llama shape of 1.0 billion weights with two-level attention; ``--experts 8`` gives every layer so many experts
of the intermediate size, of which a word uses two. Weights are written layer by layer, so that memory holds one layer. The
tokenizer is the example model's.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from bilevel.checkpoint import CONFIG, INDEX
from bilevel.config import Experts, ModelConfig, Routing
from bilevel.config_json import config_to_dict
from bilevel.errors import CheckpointError
from bilevel.folders import replacing
from bilevel.model import CausalLM

TOKENIZER = Path(__file__).parent / "model" / "tokenizer.json"


def shards(model: CausalLM) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """(file name, random weights) of the embedding, of every layer and of the head; ``model`` has shapes only."""
    groups: dict[str, list[str]] = {}
    for name in model.state_dict():
        parts = name.split(".")
        groups.setdefault(f"layer-{int(parts[2]):03}" if parts[1] == "layers" else "rest", []).append(name)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    torch.manual_seed(0)
    for group, names in groups.items():
        yield f"model-{group}.safetensors", {name: random_weight(shapes[name]) for name in names}


def random_weight(shape: torch.Size) -> torch.Tensor:
    """Ones for a norm, else normal numbers that keep the size of what they multiply."""
    return torch.ones(shape) if len(shape) == 1 else torch.randn(shape) / math.sqrt(shape[-1])


def experts(count: int, width: int, layers: int) -> Experts:
    """``count`` experts in four groups, two of them for every word, in all layers."""
    return Experts(layers=tuple(range(layers)), num_experts=count, top_k=2, n_group=4, topk_group=2, intermediate_size=width)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write the checkpoint")
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--experts", type=int, default=0, help="experts per layer, a multiple of 4; 0: a plain MLP")
    args = parser.parse_args()
    config = ModelConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 128,
        num_key_value_heads=max(args.hidden // 512, 1),
        head_dim=128,
        max_position_embeddings=32768,
        experts=experts(args.experts, args.intermediate, args.layers) if args.experts else None,
        routing=Routing(block_size=32, coarse_topk=8, topk=4),  # so small that 512 tokens leave routers a choice
    )
    with torch.device("meta"):
        model = CausalLM(config)
    count = sum(p.numel() for p in model.parameters())
    places = {}
    with replacing(args.folder, CheckpointError) as folder:
        for file, weights in shards(model):
            save_file(weights, folder / file, metadata={"format": "pt"})
            places.update(dict.fromkeys(weights, file))
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
        (folder / CONFIG).write_text(json.dumps({**config_to_dict(config), "dtype": "float32"}, indent=2) + "\n")
        (folder / "tokenizer.json").write_bytes(TOKENIZER.read_bytes())
    print(f"wrote {args.folder}: {count / 1e9:.2f} billion weights in {args.layers} layers")


if __name__ == "__main__":
    main()
