#!/usr/bin/env python3
"""Prefill and decode of a 1.1B Llama shape against llama.cpp: same random weights (BF16), same machine, in turn.

    pip install numpy gguf
    bench/compare_llama_cpp.py --llama-bench PATH/llama-bench --godwit build/cpu/bin/godwit --threads 2

Writes the weights once (2.2 GB as a Hugging Face folder, 2.2 GB as GGUF) under --folder. Each round runs llama.cpp and
Godwit once; the medians and the ratio of each round are printed.
"""
import argparse
import json
import pathlib
import statistics
import struct
import subprocess

import numpy as np

# TinyLlama 1.1B: 22 layers, grouped-query attention with 4 KV heads.
SHAPE = dict(vocab=32000, d_model=2048, d_ff=5632, layers=22, heads=32, kv_heads=4)
ROPE_THETA, EPSILON, CONTEXT = 10000.0, 1e-5, 2048


def tensor_shapes():
    """Hugging Face name -> (GGUF name, shape), in file order."""
    d, kv = SHAPE["d_model"], SHAPE["d_model"] // SHAPE["heads"] * SHAPE["kv_heads"]
    yield "model.embed_tokens.weight", "token_embd.weight", (SHAPE["vocab"], d)
    for layer in range(SHAPE["layers"]):
        hf, gguf = f"model.layers.{layer}.", f"blk.{layer}."
        yield hf + "input_layernorm.weight", gguf + "attn_norm.weight", (d,)
        yield hf + "self_attn.q_proj.weight", gguf + "attn_q.weight", (d, d)
        yield hf + "self_attn.k_proj.weight", gguf + "attn_k.weight", (kv, d)
        yield hf + "self_attn.v_proj.weight", gguf + "attn_v.weight", (kv, d)
        yield hf + "self_attn.o_proj.weight", gguf + "attn_output.weight", (d, d)
        yield hf + "post_attention_layernorm.weight", gguf + "ffn_norm.weight", (d,)
        yield hf + "mlp.gate_proj.weight", gguf + "ffn_gate.weight", (SHAPE["d_ff"], d)
        yield hf + "mlp.up_proj.weight", gguf + "ffn_up.weight", (SHAPE["d_ff"], d)
        yield hf + "mlp.down_proj.weight", gguf + "ffn_down.weight", (d, SHAPE["d_ff"])
    yield "model.norm.weight", "output_norm.weight", (d,)
    yield "lm_head.weight", "output.weight", (SHAPE["vocab"], d)


def random_bf16(rng, shape):
    """Normal values scaled by 1/sqrt(fan-in), as the upper halves of f32 words; norms are 1."""
    if len(shape) == 1:
        return np.full(shape, 0x3F80, np.uint16)
    values = rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[1]))
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def write_models(folder):
    """The pair of rotary layouts (half-split in Hugging Face, interleaved in GGUF) is left as it is: the weights are random
    and only the time counts."""
    import gguf

    folder.mkdir(parents=True, exist_ok=True)
    config = dict(architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=SHAPE["vocab"],
                  hidden_size=SHAPE["d_model"], intermediate_size=SHAPE["d_ff"], num_hidden_layers=SHAPE["layers"],
                  num_attention_heads=SHAPE["heads"], num_key_value_heads=SHAPE["kv_heads"], hidden_act="silu",
                  max_position_embeddings=CONTEXT, rms_norm_eps=EPSILON, rope_theta=ROPE_THETA,
                  tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, torch_dtype="bfloat16")
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(SHAPE["d_model"])
    writer.add_block_count(SHAPE["layers"])
    writer.add_feed_forward_length(SHAPE["d_ff"])
    writer.add_head_count(SHAPE["heads"])
    writer.add_head_count_kv(SHAPE["kv_heads"])
    writer.add_rope_dimension_count(SHAPE["d_model"] // SHAPE["heads"])
    writer.add_rope_freq_base(ROPE_THETA)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_vocab_size(SHAPE["vocab"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{i}" for i in range(SHAPE["vocab"])])
    writer.add_token_scores([0.0] * SHAPE["vocab"])
    writer.add_token_types([gguf.TokenType.NORMAL] * SHAPE["vocab"])

    header, offset = {}, 0
    for name, _, shape in tensor_shapes():
        end = offset + 2 * int(np.prod(shape))
        header[name] = dict(dtype="BF16", shape=list(shape), data_offsets=[offset, end])
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(1)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, gguf_name, shape in tensor_shapes():
            bits = random_bf16(rng, shape)
            file.write(bits.tobytes())
            if len(shape) == 1:  # llama.cpp wants norms in f32
                writer.add_tensor(gguf_name, np.ones(shape, np.float32))
            else:
                writer.add_tensor(gguf_name, bits.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run_llama_cpp(args):
    command = [args.llama_bench, "-m", str(args.folder / "model.gguf"), "-p", str(args.prompt), "-n", str(args.output),
               "-t", str(args.threads), "-r", "1", "-o", "json"]
    rows = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return (next(row["avg_ts"] for row in rows if row["n_prompt"] > 0 and row["n_gen"] == 0),
            next(row["avg_ts"] for row in rows if row["n_gen"] > 0))


def run_godwit(args):
    ids = ",".join(str(3 + i * 7919 % (SHAPE["vocab"] - 3)) for i in range(args.prompt))
    command = [args.godwit, "generate", "--model", str(args.folder), "--token-ids", ids, "--max-tokens",
               str(args.output), "--temperature", "0", "--ignore-eos", "--json", "--backend", "cpu",
               "--threads", str(args.threads)]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return args.prompt / result["prefill_seconds"], (args.output - 1) / result["decode_seconds"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-bench", required=True)
    parser.add_argument("--godwit", default="build/cpu/bin/godwit")
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("/tmp/godwit-llama-1.1b"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if not (args.folder / "model.gguf").exists():
        write_models(args.folder)
    rows = []
    for _ in range(args.rounds):
        (peer_prefill, peer_decode), (prefill, decode) = run_llama_cpp(args), run_godwit(args)
        rows.append((prefill, peer_prefill, decode, peer_decode))
        print(f"prefill {prefill:8.1f} against {peer_prefill:8.1f} tok/s ({prefill / peer_prefill:.2f}x)   "
              f"decode {decode:6.2f} against {peer_decode:6.2f} tok/s ({decode / peer_decode:.2f}x)", flush=True)
    print(f"median ratio: prefill {statistics.median(r[0] / r[1] for r in rows):.2f}x, "
          f"decode {statistics.median(r[2] / r[3] for r in rows):.2f}x")


if __name__ == "__main__":
    main()
