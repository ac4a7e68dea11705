r"""CLIP_benchmark's own command line, with a bundle or a CLIP-MoE as the model that it evaluates.

    python -m modeclip.evaluation.clip_benchmark eval --model_type modeclip --model BUNDLE --pretrained RULE --no_amp \
        --dataset wds/pets --dataset_root tasks/{dataset} --output {dataset}.json

The installed package runs as it is: this module registers one more kind of model and hands over. ``--pretrained`` is
the routing rule; ``default``, or leaving it out, means the bundle's own. ``--encoder MODULE:ATTRIBUTE`` names an
encoder that is Python code, which runs only if it is named here. The folder of a CLIP-MoE, which open_clip cannot load,
stands in the place of a bundle and has no rule. CLIP_benchmark loads the model before the
dataset, so the model is routed when the dataset is known. A classification is routed by its class names: every prompt
has the weights of its class, and experts without weight are not run. Anything else is routed text by text.

CLIP_benchmark normalises vectors, so the mixture is given in its form of unit norm (`modeclip.mixture.routed_clip`).
Cosines are the mixture's similarities divided by sqrt(K), so their order is the same, and with one template a class so
are all metrics. With several templates CLIP_benchmark averages the unit vectors of all experts together and normalises
once, while modeclip's own evaluation, like the paper, normalises the mean of each expert. So there a class's weights
depend on how much the prompts differ within each expert. Its text retrieval uses the same weights as its image
retrieval, which modeclip does only under ``per_class`` and ``uniform``; Eq. 7 (one vector for the whole corpus) needs
`modeclip evaluate`. Without ``--no_amp`` it multiplies in half precision, and its numbers vary with the hardware.

Source: CLIP_benchmark 1.6; MoDE (arXiv 2404.16030) Sec. 3.4.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from modeclip.errors import ModeclipError, in_one_line, unknown
from modeclip.mixture.mode import MoDE
from modeclip.mixture.routed_clip import RoutedClip
from modeclip.mixture.router import Route
from modeclip.mixture.rules import RULES
from modeclip.models.clip import CONFIG_FILE, load_clip, without_gradients
from modeclip.system.console import log
from modeclip.system.paths import home_path

MODEL_TYPE = "modeclip"
DEFAULT_RULE = "default"
"""Value of ``--pretrained`` that means the bundle's own rule."""


class RoutedByDataset(nn.Module):
    """A mixture as CLIP_benchmark takes a model: vectors of unit norm, routed once the dataset is known."""

    def __init__(self, mode: MoDE, rule: str | None, device: str | torch.device) -> None:
        """Let every expert take part, with weights text by text, until classes are known.

        Args:
            mode: The mixture.
            rule: Routing rule; None: the bundle's.
            device: Where the experts run.
        """
        super().__init__()
        self._mode, self._rule, self._device = mode, rule, device
        num_experts = mode.bundle.num_experts
        everyone = Route(
            classnames=("",),
            request=mode.request(rule=rule, each=True),
            fixed_weights=np.full((1, num_experts), 1 / num_experts),
            router=mode.router,
            bundle=mode.bundle,
        )
        self.task = RoutedClip(everyone, mode.pool).to(device)
        self.preprocess = self.task.preprocess
        self._last: tuple[tuple[str, ...], Tensor] = (), torch.empty(0)
        self._class_of_prompt: dict[str, int] = {}

    def route_by(self, classnames: Sequence[str], templates: Sequence[str] | Mapping[str, Sequence[str]]) -> None:
        """Route to the classes of a dataset.

        Args:
            classnames: L class names.
            templates: Prompts with ``{c}`` for the name, or the prompts of each class.
        """
        self.task = self._mode.task(classnames, rule=self._rule).to(self._device)
        for index, name in enumerate(classnames):
            prompts = templates[name] if isinstance(templates, Mapping) else [t.format(c=name) for t in templates]
            for prompt in prompts:
                first = self._class_of_prompt.setdefault(prompt, index)
                if first != index:
                    log(
                        f"modeclip: classes {classnames[first]!r} and {name!r} have the same prompt {prompt!r}; it "
                        "gets the weights of the first"
                    )

    def tokenizer(self, texts: Sequence[str]) -> Tensor:
        """Turn texts into token ids, and remember the texts, which are encoded next."""
        tokens: Tensor = self.task.tokenizer(list(texts))
        self._last = tuple(texts), tokens
        return tokens

    @without_gradients()
    def encode_image(self, images: Tensor) -> Tensor:
        """Encode (B, 3, H, W) images into (B, D * active experts + 1) unit vectors."""
        with torch.autocast(images.device.type, enabled=False):
            return self.task.encode_image(images, normalize=True)

    @without_gradients()
    def encode_text(self, tokens: Tensor) -> Tensor:
        """Encode token ids, just made by ``tokenizer``, into unit vectors that carry the weights.

        Raises:
            ModeclipError: The token ids are not those that ``tokenizer`` made last.
        """
        texts, made = self._last
        if made.shape != tokens.shape or not torch.equal(made, tokens.cpu()):
            raise ModeclipError("clip_benchmark: texts must be encoded in the batches in which they were tokenized")
        with torch.autocast(tokens.device.type, enabled=False):
            return self.task.encode_text(tokens, normalize=True, weights=self._weights_of(texts))

    def _weights_of(self, texts: Sequence[str]) -> Float[np.ndarray, "B K"]:
        """Return the weights of the class for its prompts, and of the text itself for any other."""
        rows = np.array([self._class_of_prompt.get(text, -1) for text in texts])
        weights: np.ndarray = self.task.route.class_weights[rows]
        strangers: list[int] = np.flatnonzero(rows < 0).tolist()
        if strangers:
            weights[strangers] = self._mode.route_queries([texts[row] for row in strangers], rule=self._rule)
        return weights


def load(
    model_name: str,
    pretrained: str,
    cache_dir: str | None = None,
    device: str | torch.device = "cpu",
    encoder: str | None = None,
) -> tuple[nn.Module, Any, Callable[[Sequence[str]], Tensor]]:
    """Load a bundle as CLIP_benchmark loads models: (model, transform, tokenizer).

    Args:
        model_name: Folder of the bundle, its id on the Hub, or the folder of one model.
        pretrained: Routing rule, or ``default``; one model has no other.
        cache_dir: Not used; a bundle is not copied.
        device: Where it runs.
        encoder: Encoder that takes the place of the bundle's and may be Python code; None: the bundle's.
    """
    del cache_dir
    rule = None if pretrained in (DEFAULT_RULE, "") else pretrained
    if rule is not None and rule not in RULES:
        raise unknown("rule", rule, [DEFAULT_RULE, *RULES])
    if (home_path(model_name) / CONFIG_FILE).is_file():
        if rule:
            raise ModeclipError(f"model {model_name}: one model is not routed by a rule; leave --pretrained {rule} out")
        clip = load_clip(model_name)
        return clip.model.eval().to(device), clip.preprocess, clip.tokenizer
    mode = MoDE.load(model_name, encoder=encoder)
    if mode.per_image:
        raise ModeclipError(
            f"bundle {model_name}: its clusters are of images, and CLIP_benchmark hands over no pictures to route; "
            "use `modeclip evaluate`"
        )
    model = RoutedByDataset(mode, rule, device)
    return model, model.preprocess, model.tokenizer


def main(arguments: Sequence[str] | None = None) -> None:
    """Run CLIP_benchmark's command line with bundles and CLIP-MoEs as one more kind of model."""
    try:
        from clip_benchmark import cli, models
    except ImportError:
        raise ModeclipError("clip_benchmark is not installed; pip install clip-benchmark") from None
    given, encoder = _without_encoder(list(sys.argv[1:] if arguments is None else arguments))
    loaded: list[RoutedByDataset] = []

    def load_noted(**named: Any) -> tuple[nn.Module, Any, Callable[[Sequence[str]], Tensor]]:
        found = load(**named, encoder=encoder)
        loaded[:] = [found[0]] if isinstance(found[0], RoutedByDataset) else []
        return found

    def build_routed(*positional: Any, **named: Any) -> Any:
        """Build a dataset, and route the model that was loaded for it."""
        dataset = build(*positional, **named)
        if loaded and named.get("task") == "zeroshot_classification" and getattr(dataset, "classes", None):
            loaded.pop().route_by(dataset.classes, dataset.templates)
        return dataset

    def run_with_workers(args: Any) -> Any:
        """Evaluate one dataset with at most a worker for each shard: a worker without one would be an error."""
        args.num_workers = min(args.num_workers, _num_shards(args))
        return run_one(args)

    _mend_accuracy()
    build, run_one = cli.build_dataset, cli.run
    models.TYPE2FUNC[MODEL_TYPE] = load_noted
    if MODEL_TYPE not in models.MODEL_TYPES:
        models.MODEL_TYPES.append(MODEL_TYPE)  # the list that the command line's choices are
    cli.build_dataset, cli.run = build_routed, run_with_workers
    before, sys.argv = sys.argv, ["modeclip.evaluation.clip_benchmark", *_with_output(_with_rule(given))]
    try:
        cli.main()
    finally:
        sys.argv, cli.build_dataset, cli.run = before, build, run_one


def _num_shards(args: Any) -> int:
    """Return the number of shards of a local webdataset; any other dataset takes all workers."""
    prefix, name = args.dataset[:4], args.dataset[4:]
    if prefix != "wds/":
        return int(args.num_workers)
    root = args.dataset_root.format(dataset=name, dataset_cleaned=name.replace("/", "-"))
    try:
        return int(Path(root, args.split, "nshards.txt").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # at an address, or CLIP_benchmark says what is wrong
        return int(args.num_workers)


def _mend_accuracy() -> None:
    """Replace CLIP_benchmark's accuracy by our own where the installed NumPy refuses what it does.

    Version 1.6 makes numbers of arrays of one element, which is an error since NumPy 2.4.
    """
    from clip_benchmark.metrics import zeroshot_classification

    def accuracy(output: Tensor, target: Tensor, topk: Sequence[int] = (1,)) -> list[float]:
        best = output.topk(max(topk), dim=1).indices
        return [float((best[:, :k] == target[:, None]).any(dim=1).double().mean()) for k in topk]

    try:
        zeroshot_classification.accuracy(torch.eye(2), torch.tensor([0, 1]))
    except TypeError:
        zeroshot_classification.accuracy = accuracy


def _without_encoder(arguments: list[str]) -> tuple[list[str], str | None]:
    """Take ``--encoder NAME`` out of the arguments: a word of ours, which CLIP_benchmark does not know."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--encoder")
    own, others = parser.parse_known_args(arguments)
    return others, own.encoder


def _is_ours(arguments: list[str]) -> bool:
    return arguments[:1] == ["eval"] and bool({MODEL_TYPE, f"--model_type={MODEL_TYPE}"} & set(arguments))


def _with_rule(arguments: list[str]) -> list[str]:
    """Ask for the bundle's own rule if none is given; CLIP_benchmark's default is the weights of another model."""
    has_rule = any(word.split("=")[0] in ("--pretrained", "--pretrained_model") for word in arguments)
    if not _is_ours(arguments) or has_rule:
        return arguments
    return [*arguments, "--pretrained", DEFAULT_RULE]


def _with_output(arguments: list[str]) -> list[str]:
    """Name the result file if no name is given; CLIP_benchmark's default contains the model's, here a path."""
    has_output = any(word.split("=")[0] == "--output" for word in arguments)
    if not _is_ours(arguments) or has_output or "--model" not in arguments:
        return arguments
    place = arguments.index("--model") + 1
    named = arguments[place : place + 1]
    several = arguments[place + 1 : place + 2]
    if several and not several[0].startswith("-"):
        raise ModeclipError("clip_benchmark: several models need --output NAME with {model} or {pretrained} in it")
    name = Path(*named).resolve().name.replace("{", "{{").replace("}", "}}")
    return [*arguments, "--output", f"{{dataset}}_{{pretrained}}_{name}_{{language}}_{{task}}.json"]


if __name__ == "__main__":
    try:
        main()
    except (ModeclipError, OSError) as error:
        message = in_one_line(error) if isinstance(error, OSError) else error
        log(f"modeclip: error: {message}")
        raise SystemExit(2) from None
