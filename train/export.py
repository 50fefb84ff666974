#!/usr/bin/env python3
"""Writes a TransNormerLLM checkpoint as a Hugging Face folder with the published tensor names, in bf16.

    export.py folder RUN/model.pt --tokenizer tokenizer.model --out FOLDER [--shard-bytes 15000000] [--bos 2]
    export.py merge  FOLDER            one model.safetensors out of the shards
    export.py golden FOLDER --out FOLDER/golden.json
"""
import argparse
import json
import pathlib
import shutil
import struct

import torch

import model as M

GOLDEN_PROMPTS = ["Once upon a time there was", "The Railway Children\n\nChapter I",
                  "\"I do not know,\" said the old man, \"whether"]


def published_names(net):
    """Name -> tensor, as OpenNLPLab's checkpoints spell them; the head is tied to the embedding."""
    w, cfg = net.state_dict(), net.cfg
    tensors = {"model.embed_tokens.weight": w["embed"]}
    for layer in range(cfg.layers):
        mixer, channel = f"model.layers.{layer}.token_mixer", f"model.layers.{layer}.channel_mixer"
        tensors[f"{mixer}.qkvu_proj.weight"] = w["mix_in"][layer].flatten(0, 1)
        tensors[f"{mixer}.out_proj.weight"] = w["mix_out"][layer]
        if layer == 0:
            tensors[f"{mixer}.lrpe.theta"] = w["theta"]
        tensors[f"{channel}.l1.weight"] = w["glu_in"][layer, 0]
        tensors[f"{channel}.l2.weight"] = w["glu_in"][layer, 1]
        tensors[f"{channel}.l3.weight"] = w["glu_out"][layer]
    return tensors


def hf_config(cfg, bos):
    return {
        "architectures": ["TransnormerForCausalLM"], "model_type": "transnormer",
        "vocab_size": cfg.vocab_size, "decoder_embed_dim": cfg.dim, "decoder_layers": cfg.layers,
        "decoder_attention_heads": cfg.heads, "hidden_dim": cfg.dim, "glu_dim": cfg.glu,
        "linear_use_lrpe_list": [1] + [0] * (cfg.layers - 1), "linear_act_fun": "swish",
        "norm_type": "simplermsnorm", "no_scale_embedding": False, "add_bos_token": False, "bias": False,
        "init_std": 0.02, "pad_token_id": 0, "bos_token_id": bos, "eos_token_id": 2, "use_cache": True,
        "torch_dtype": "bfloat16", "tie_word_embeddings": True}


def write_safetensors(path, blobs):
    """blobs: name -> (shape, bf16 bytes). Header: u64 length, JSON padded to 8, then the data."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, (shape, data) in blobs.items():
        header[name] = dict(dtype="BF16", shape=shape, data_offsets=[offset, offset + len(data)])
        offset += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, data in blobs.values():
            file.write(data)


def read_safetensors(path):
    raw = pathlib.Path(path).read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:8 + length])
    header.pop("__metadata__", None)
    return {name: (item["shape"], raw[8 + length + item["data_offsets"][0]:8 + length + item["data_offsets"][1]])
            for name, item in header.items()}


def write_folder(net, tokenizer, out, shard_bytes, bos):
    out.mkdir(parents=True, exist_ok=True)
    shards, size = [{}], 0
    for name, tensor in published_names(net).items():
        data = tensor.bfloat16().contiguous().view(torch.int16).numpy().tobytes()
        if size and size + len(data) > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = (list(tensor.shape), data)
        size += len(data)
    if len(shards) == 1:
        write_safetensors(out / "model.safetensors", shards[0])
    else:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        for name, shard in zip(names, shards):
            write_safetensors(out / name, shard)
        total = sum(len(data) for shard in shards for _, data in shard.values())
        (out / "model.safetensors.index.json").write_text(json.dumps(dict(
            metadata=dict(total_size=total),
            weight_map={key: name for name, shard in zip(names, shards) for key in shard}), indent=1))
    (out / "config.json").write_text(json.dumps(hf_config(net.cfg, bos), indent=1) + "\n")
    (out / "tokenizer_config.json").write_text(json.dumps(dict(
        tokenizer_class="LlamaTokenizer", add_bos_token=False, add_eos_token=False, bos_token="<s>",
        eos_token="</s>", unk_token="<unk>", legacy=False), indent=1) + "\n")
    if tokenizer and pathlib.Path(tokenizer).resolve() != (out / "tokenizer.model").resolve():
        shutil.copy(tokenizer, out / "tokenizer.model")


def merge(folder):
    shards = sorted(folder.glob("model-*.safetensors"))
    blobs = {}
    for shard in shards:
        blobs.update(read_safetensors(shard))
    write_safetensors(folder / "model.safetensors", blobs)
    for old in shards + [folder / "model.safetensors.index.json"]:
        old.unlink()


def read_folder(folder):
    folder = pathlib.Path(folder)
    config = json.loads((folder / "config.json").read_text())
    net = M.Model(M.Config("transnormer", config["vocab_size"], config["decoder_embed_dim"],
                           config["decoder_layers"], config["decoder_attention_heads"], config["glu_dim"]))
    stored = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, (shape, data) in read_safetensors(path).items():
            stored[name] = torch.frombuffer(bytearray(data), dtype=torch.bfloat16).view(shape).float()
    with torch.no_grad():
        for name, tensor in published_names(net).items():  # views of the parameters
            tensor.copy_(stored.pop(name).view(tensor.shape))
    assert not stored, f"unknown tensors {list(stored)}"
    return net.eval()


def load_model(path, device="cpu"):
    """A training checkpoint (rounded to bf16) or an exported folder."""
    if pathlib.Path(path).is_dir():
        return read_folder(path).to(device)
    return M.load_checkpoint(path, device)


@torch.no_grad()
def golden(folder, out, count=64):
    """Greedy continuations in float32, for tests of other implementations."""
    import sentencepiece as spm
    from evaluate import generate

    net = read_folder(folder)
    processor = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    cases = []
    for text in GOLDEN_PROMPTS:
        ids = processor.encode(text)
        (greedy,), (margins,) = generate(net, [ids], count, 0.0, 0, "cpu")
        hidden, _ = net(torch.tensor([ids]))
        cases.append(dict(prompt=text, prompt_ids=ids, greedy=greedy, margins=[round(m, 4) for m in margins],
                          last_logits_head=[round(x, 4) for x in net.logits(hidden)[0, -1, :16].tolist()],
                          text=processor.decode(ids + greedy)))
    note = ("float32 arithmetic on the stored bf16 weights; margins[i] is the gap between the two largest logits "
            "where greedy[i] was chosen; last_logits_head: logits 0..15 after the prompt")
    out.write_text(json.dumps(dict(note=note, cases=cases), indent=None) + "\n")
    for case in cases:
        print(repr(case["text"]), "smallest margin", min(case["margins"]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("command", choices=["folder", "merge", "golden"])
    parser.add_argument("source", type=pathlib.Path)
    parser.add_argument("--tokenizer")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--shard-bytes", type=int, default=10 ** 12)
    parser.add_argument("--bos", type=int, default=1, help="2: the end mark, behind which every work began in training")
    args = parser.parse_args()
    if args.command == "folder":
        write_folder(M.load_checkpoint(args.source), args.tokenizer, args.out, args.shard_bytes, args.bos)
    elif args.command == "merge":
        merge(args.source)
    else:
        golden(args.source, args.out)
