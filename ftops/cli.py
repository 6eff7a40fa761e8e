"""The command line: `ftops demo | info | generate | bench | tune | quantize | evaluate`. A command imports what it needs when it runs."""
from __future__ import annotations

import argparse
import os
import sys

from rich.console import Console

import ftops


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns the exit status: 0, 1 where a comparison failed, 2 where an argument cannot be served."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without the model's characters shows "?"
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except ValueError as error:
        print(f"ftops {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        print("ftops: transformers is not installed; pip install 'ftops[demo]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)  # the shell's prompt is not to follow half a line
        return 130
    except BrokenPipeError:  # as in `ftops generate ... | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more as it ends
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ftops", description="Fused layers for Hugging Face models.")
    parser.add_argument("--version", action="version", version=f"ftops {ftops.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser("demo", help="two real models, before and after ftops.patch: is the output the same, and how fast is it")
    demo.set_defaults(run=_demo)
    _add_placement(demo)
    demo.add_argument("--runs", type=int, default=5, help="timed passes, of which the median is shown (default 5)")
    demo.add_argument("--max-new-tokens", type=int, default=64, help="tokens that the generator adds to each prompt (default 64)")

    info = commands.add_parser("info", help="versions, GPUs or what is missing for them, and what serves each op")
    info.set_defaults(run=_info)

    generate = commands.add_parser("generate", help="continue a prompt with a patched model, streaming the text")
    generate.set_defaults(run=_generate)
    generate.add_argument("--prompt", required=True, help="the text to continue")
    generate.add_argument("--model", help="folder or Hugging Face hub id (default: the small Python-writing model that ftops carries)")
    generate.add_argument("--max-new-tokens", type=int, default=128, help="default 128")
    generate.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy decoding")
    generate.add_argument("--seed", type=int, default=0, help="of the sampling, default 0")
    generate.add_argument("--no-patch", action="store_true", help="run the model as transformers has it")
    _add_placement(generate)

    bench = commands.add_parser("bench", help="tokens a second beside Hugging Face's, over batch sizes and contexts: a table, a plot")
    bench.set_defaults(run=_bench)
    bench.add_argument("model", nargs="?", help="folder or Hugging Face hub id (default: the small model that ftops carries)")
    bench.add_argument("--batch", default="1,4,16", help="rows generated together, default 1,4,16")
    bench.add_argument("--context", default="128,512", help="tokens of the prompt, default 128,512")
    bench.add_argument("--new-tokens", type=int, default=32, help="tokens of each row, default 32")
    bench.add_argument("--quant", help="int4, int8, fp8 or w8a8 for the side of ftops")
    bench.add_argument("--compile", action="store_true", help="also Hugging Face with a static cache and torch.compile, on a GPU")
    bench.add_argument("--repeats", type=int, default=3, help="timed runs, of which the median is shown, default 3")
    bench.add_argument("--json", metavar="FILE", help="write all figures there")
    bench.add_argument("--plot", metavar="FILE", help="draw them there: a .png, .svg or .pdf")
    _add_placement(bench)

    tune = commands.add_parser("tune", help="measure which kernel is the fastest for each linear layer of a model on this GPU, and keep it")
    tune.set_defaults(run=_tune)
    tune.add_argument("model", nargs="?", help="folder or Hugging Face hub id; only its configuration is read (default: the small model)")
    tune.add_argument("--quant", nargs="+", help="weights: none (16 bits, the default), int8, int4, fp8, w8a8")
    tune.add_argument("--device", help="cuda (the default), cuda:1 and so on")
    tune.add_argument("--dtype", choices=("float16", "bfloat16"), help="of activations (default: the model's, or bfloat16)")

    quantize = commands.add_parser("quantize", help="save a model with its linear layers in 4 or 8 bits")
    quantize.set_defaults(run=_quantize)
    quantize.add_argument("model", help="folder or Hugging Face hub id")
    quantize.add_argument("folder", help="a new folder for the quantised model and its tokenizer")
    quantize.add_argument("--quant", default="int4", help="int4 (the default), int8, fp8 or w8a8")
    _add_quantisation(quantize)
    _add_placement(quantize)

    evaluate = commands.add_parser("evaluate", help="perplexity and the largest logit error of a model in each format, on a text")
    evaluate.set_defaults(run=_evaluate)
    evaluate.add_argument("model", nargs="?", help="folder or Hugging Face hub id (default: the small model that ftops carries)")
    evaluate.add_argument("--quant", nargs="+", help="formats (default: int4 int8 fp8 w8a8)")
    evaluate.add_argument("--text", help="a text file (default: modules of Python's standard library)")
    evaluate.add_argument("--windows", type=int, default=8, help="windows of up to 1024 tokens, default 8")
    _add_quantisation(evaluate)
    _add_placement(evaluate)
    return parser


def _add_quantisation(command: argparse.ArgumentParser) -> None:
    command.add_argument("--group-size", type=int, help="of int4: 32, 64 or 128 (default)")
    command.add_argument("--zero-points", action="store_true", help="of int4")
    command.add_argument("--head", help="a format for the output head too (default: it is kept as it is)")
    command.add_argument("--embeddings", help="int8 or fp8 for the embeddings too (default: they are kept as they are)")


def _add_placement(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", help="cpu, cuda, cuda:1 (default: the GPU where there is one) or auto (spread over all devices)")
    command.add_argument("--dtype", choices=("float32", "float16", "bfloat16"),
                         help="default: 16 bits as in the checkpoint on a GPU, float32 on a CPU")


def _demo(options: argparse.Namespace) -> int:
    from ftops.integrations.demo.demo import demo
    same = demo(device=options.device, dtype=options.dtype, runs=options.runs, max_new_tokens=options.max_new_tokens)
    return 0 if same else 1


def _info(_: argparse.Namespace) -> int:
    from ftops.info import show
    show(Console())
    return 0


def _generate(options: argparse.Namespace) -> int:
    from ftops.integrations.demo.generate import generate
    line = generate(options.prompt, model=options.model, max_new_tokens=options.max_new_tokens, temperature=options.temperature,
                    seed=options.seed, dtype=options.dtype, device=options.device, patch=not options.no_patch)
    print(line, file=sys.stderr)
    return 0


def _bench(options: argparse.Namespace) -> int:
    from ftops.integrations.bench import bench
    from ftops.integrations.bench_show import check_files, draw, show, write
    check_files(options.json, options.plot)
    found = bench(options.model, batches=_integers("--batch", options.batch), contexts=_integers("--context", options.context),
                  new_tokens=options.new_tokens, quant=options.quant, compiled=options.compile, repeats=options.repeats,
                  device=options.device, dtype=options.dtype)
    show(Console(), found)
    for file, make in ((options.json, write), (options.plot, draw)):
        if file is not None:
            make(found, file)
            print(f"written: {file}", file=sys.stderr)
    return 0


def _tune(options: argparse.Namespace) -> int:
    from ftops.integrations.tune import show, tune_model
    show(Console(), *tune_model(options.model, options.quant, device=options.device, dtype=options.dtype))
    return 0


def _integers(argument: str, text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f"bench: {argument} is {text!r}; allowed: numbers with commas between them, such as 1,4,16") from None


def _quantisation(options: argparse.Namespace) -> dict[str, object]:
    return {name: getattr(options, name) for name in ("group_size", "zero_points", "head", "embeddings")}


def _quantize(options: argparse.Namespace) -> int:
    from ftops.integrations.evaluate import quantize
    model = quantize(options.model, options.folder, options.quant, device=options.device, dtype=options.dtype,
                     options=_quantisation(options))
    Console().print(ftops.report(model))
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from ftops.integrations.evaluate import evaluate, show
    show(Console(), evaluate(options.model, options.quant, text=options.text, windows=options.windows, device=options.device,
                             dtype=options.dtype, options=_quantisation(options)))
    return 0
