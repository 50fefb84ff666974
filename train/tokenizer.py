#!/usr/bin/env python3
"""A 4,096-piece sentencepiece tokenizer, as of the shipped models: train it, or encode the corpus with it.

    tokenizer.py train  --corpus DIR --model OUT/tokenizer.model [--code]
    tokenizer.py encode --corpus DIR --model OUT/tokenizer.model --out DATA [--workers 16] [--split-bytes N]

DIR holds train-*.txt and valid*.txt: whole works, each followed by a line with only <|endoftext|>.
--code: the corpus holds source code, whose runs of spaces and tabs deserve pieces. --split-bytes: longer
works become several at paragraph breaks, so that a book begins as often as its length deserves.
DATA becomes tokens.npy (uint16) and works.json. The stream is  eos work eos work eos ...  so that
every token of a work, its first one too, has a token before it: a work is the span [begin, end) of
targets, its last target is the eos that ends it, and its first input is the eos before it.
"""
import argparse
import json
import multiprocessing
import pathlib

END_OF_WORK = "<|endoftext|>"
EOS_ID = 2


def works_of(path):
    """The works of one corpus file, without the newlines around them."""
    text = path.read_text(encoding="utf-8")
    parts = ("\n" + text).split(f"\n{END_OF_WORK}\n")
    return [part.strip("\n") for part in parts if part.strip()]


def split_work(work, num_bytes):
    """The work in pieces of about num_bytes, cut between paragraphs; whole for 0."""
    if num_bytes == 0 or len(work) <= num_bytes:
        return [work]
    pieces, paragraphs, size = [], [], 0
    for paragraph in work.split("\n\n"):
        if size + len(paragraph) > num_bytes and paragraphs:
            pieces.append("\n\n".join(paragraphs))
            paragraphs, size = [], 0
        paragraphs.append(paragraph)
        size += len(paragraph) + 2
    return pieces + ["\n\n".join(paragraphs)]


def train(corpus, model, code):
    import sentencepiece as spm
    from sentencepiece import sentencepiece_model_pb2 as pb

    prefix = str(model)[: -len(".model")]
    spm.SentencePieceTrainer.train(
        input=[str(p) for p in sorted(corpus.glob("train-*.txt"))],
        model_prefix=prefix, model_type="bpe", vocab_size=4096, byte_fallback=True,
        character_coverage=0.99995, max_sentence_length=65536, num_threads=2,
        # Nothing is rewritten and no space is dropped, so that Decode(Encode(x)) == x.
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        # The trainer reads lines, hence never sees a newline: both breaks are given to it.
        user_defined_symbols=["\n\n", "\n"] + (["\t\t\t", "\t\t", "\t"] if code else []),
        allow_whitespace_only_pieces=code,
        # Trained without the dummy prefix (a paragraph begins after "\n\n", without a space, and
        # deserves pieces for that), served with it as Llama-style tokenizers are.
        add_dummy_prefix=False,
        unk_id=0, bos_id=1, eos_id=EOS_ID, pad_id=-1)
    proto = pb.ModelProto()
    proto.ParseFromString(model.read_bytes())
    proto.normalizer_spec.add_dummy_prefix = True
    proto.trainer_spec.input[:] = ["train-*.txt"]
    proto.trainer_spec.model_prefix = "tokenizer"
    model.write_bytes(proto.SerializeToString())
    pathlib.Path(prefix + ".vocab").unlink()

    processor = spm.SentencePieceProcessor(model_file=str(model))
    sample = works_of(corpus / "valid.txt")[0]
    for text in (sample, " a  b", "\nx\n\n\ny ", "caf\u00e9 \u2192 \U0001f600", '"No," he said--"no!"'):
        assert processor.decode(processor.encode(text)) == text, text[:80]
    print(f"{len(sample.encode()) / len(processor.encode(sample)):.3f} bytes a token on a held-out work")


def encode_file(job):
    import sentencepiece as spm

    path, model, split_bytes = job
    processor = spm.SentencePieceProcessor(model_file=str(model))
    return [(processor.encode(work), len(work.encode()), work.split("\n", 1)[0][:60])
            for whole in works_of(path) for work in split_work(whole, split_bytes)]


def encode(corpus, model, out, workers, split_bytes):
    import numpy as np

    paths = sorted(corpus.glob("train-*.txt")) + sorted(corpus.glob("valid*.txt"))
    with multiprocessing.Pool(workers) as pool:
        files = pool.map(encode_file, [(path, model, split_bytes) for path in paths], chunksize=1)
    stream, works, position = [np.array([EOS_ID], np.uint16)], [], 1
    for path, encoded in zip(paths, files):
        for ids, num_bytes, title in encoded:
            stream.append(np.array(ids + [EOS_ID], np.uint16))
            end = position + len(ids) + 1
            works.append(dict(split="valid" if path.stem.startswith("valid") else "train", title=title,
                              begin=position, end=end, num_bytes=num_bytes))
            position = end
    out.mkdir(parents=True, exist_ok=True)
    np.save(out / "tokens.npy", np.concatenate(stream))
    (out / "works.json").write_text(json.dumps(works, indent=0))
    for split in ("train", "valid"):
        part = [w for w in works if w["split"] == split]
        tokens = sum(w["end"] - w["begin"] for w in part)
        num_bytes = sum(w["num_bytes"] for w in part)
        print(f"{split}: {len(part)} works, {tokens} tokens, {num_bytes / tokens:.4f} bytes a token")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("command", choices=["train", "encode"])
    parser.add_argument("--corpus", type=pathlib.Path, required=True)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--code", action="store_true")
    parser.add_argument("--split-bytes", type=int, default=0)
    args = parser.parse_args()
    if args.command == "train":
        train(args.corpus, args.model, args.code)
    else:
        encode(args.corpus, args.model, args.out, args.workers, args.split_bytes)
