"""The scripts that measure what the mixture buys: their controls are what they claim, and they run."""

import json
import math
import random
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fresh_processes import PROGRAMS, fork_server
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPTS = Path(__file__).parents[1] / "examples" / "softmax_bottleneck"
D, V, LENGTH = 8, 60, 16
TINY = ["--vocab-size", "300", "--hidden-size", str(D), "--num-layers", "1", "--steps", "2"]


@pytest.fixture(scope="module", autouse=True)
def scripts():
    """The scripts' modules can be imported, and are forgotten afterwards."""
    before = set(sys.modules)
    sys.path.insert(0, str(SCRIPTS))
    yield
    sys.path.remove(str(SCRIPTS))
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == SCRIPTS:
            del sys.modules[name]


@pytest.fixture
def data_dir(tmp_path):
    """Sentences over a few words, which a small model learns something of."""
    words, generator = ["the", "cat", "dog", "sees", "hears", "big", "house", "and", "runs"], random.Random(0)
    for split, lines in (("train", 400), ("valid", 60), ("test", 60)):
        text = "\n".join(" ".join(generator.choices(words, k=9)) for _ in range(lines))
        (tmp_path / f"{split}.txt").write_text(text)
    return tmp_path


def run(script, *arguments):
    result = fork_server(*PROGRAMS).run(str(SCRIPTS / script), *arguments, kind="script")
    assert result.returncode == 0, result.stderr
    return result.stdout


def some_text():
    from text import Text

    blocks = torch.randint(V, (40, LENGTH), generator=torch.Generator().manual_seed(0))
    return Text("random", V, blocks[:20], blocks[20:30], blocks[30:])


@pytest.mark.parametrize("kind", ["layers", "warmed", "late"])
def test_heads_of_the_study_from_scratch(kind):
    """At first they are the softmax, and train as a mixture; the schedules read the progress that `fit` sets."""
    from models import Head, LlamaSize, new_softmax_model, with_head

    backbone, tokens = new_softmax_model(LlamaSize(D, 2), V, LENGTH, seed=0), torch.randint(V, (3, LENGTH))
    model = with_head(backbone, Head.from_name(f"{kind} K=3 M=4"), seed=0)
    torch.testing.assert_close(model(tokens, labels=tokens).loss, backbone(tokens, labels=tokens).loss)
    hidden_states = model.head_inputs(tokens)
    nonzero = {}
    for progress in (0.0, 0.25, 0.5):
        model.mos_head.progress = progress
        loss = model.mos_head(hidden_states, tokens)
        (gradient,) = torch.autograd.grad(loss, model.mos_head.shift.weight, retain_graph=True)
        assert gradient.isfinite().all()
        nonzero[progress] = bool(gradient.any())
    assert nonzero == {0.0: kind == "layers", 0.25: kind != "late", 0.5: True}
    if kind == "layers":
        model.mos_head(hidden_states, tokens).backward()
        assert model.mos_head.middle_shift.weight.grad.any()


@pytest.mark.parametrize("width", [D, 72])  # at the second the default rank is not full
def test_the_softmax_control_is_the_softmax(width):
    from models import SOFTMAX, Size, new_softmax_model, with_head

    model, tokens = new_softmax_model(Size(width, 1), V, LENGTH, seed=0).eval(), torch.randint(V, (3, LENGTH))
    control = with_head(model, SOFTMAX, seed=0).eval()
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
        torch.testing.assert_close(control(input_ids=tokens).logits, logits.log_softmax(-1))
        expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        torch.testing.assert_close(control(input_ids=tokens, labels=tokens).loss, expected)
    assert control.num_parameters() == model.num_parameters()


def test_the_contexts_control_mixes_before_its_one_softmax():
    from models import Size, contexts, new_softmax_model, with_head

    head = with_head(new_softmax_model(Size(D, 1), V, LENGTH, seed=0), contexts(3), seed=0).lm_head.eval()
    head.shift.weight.data.normal_(std=0.1)
    hidden_states = torch.randn(5, D)
    scale = head.latent_scale
    weights = head.prior(scale * hidden_states).softmax(-1)
    latents = hidden_states.unsqueeze(1) + scale * head.shift(hidden_states).view(5, 3, D)
    mixed = (weights.unsqueeze(-1) * latents).sum(1)
    with torch.no_grad():
        torch.testing.assert_close(head(hidden_states), F.linear(mixed, head.weight).log_softmax(-1))


def test_a_seed_gives_every_head_the_same_backbone():
    from models import Size, contexts, mixture, new_softmax_model, with_head

    size = Size(D, 1)
    models = [with_head(new_softmax_model(size, V, LENGTH, seed=3), head, 3) for head in (mixture(4), contexts(2))]
    first, second = (dict(model.transformer.named_parameters()) for model in models)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@torch.no_grad()
def test_other_shortlists_choose_as_they_say():
    from models import HEAD_CLASSES, LIKELY, Head, Size, mixture, new_softmax_model, with_head

    backbone = new_softmax_model(Size(D, 1), V, LENGTH, 0)
    options = {"num_mixtures": 3, "shortlist_size": 5}
    own_kind, likely_kind = [kind for kind in HEAD_CLASSES if kind.startswith(("own", "classes"))]
    heads = [with_head(backbone, head, 0).lm_head for head in (mixture(**options), Head(own_kind, options))]
    states, ids = 3 * torch.randn(2, LENGTH, D), torch.randint(9, (2, LENGTH))  # few classes, so that some repeat
    targets = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], dim=1)
    for head in heads:
        torch.manual_seed(0)
        torch.nn.init.normal_(head.shift.weight)
        torch.nn.init.normal_(head.prior.weight)

    z = F.linear(states, heads[1].weight)
    classes, is_in = heads[1].chosen(z, targets)
    for b in range(2):
        for t in range(LENGTH):
            found = classes[b, t][is_in[b, t]].tolist()
            assert len(found) == len(set(found))
            # The first token of a row is not among the targets of the row.
            assert set(found) == {*z[b, t].topk(5).indices.tolist(), *ids[b, 1 : t + 1].tolist()}
    # A shortlist that the head itself would choose gives its loss.
    heads[1].chosen = lambda z, targets: (z.topk(5).indices, torch.ones(*z.shape[:-1], 5, dtype=torch.bool))
    losses = [head(states, targets, reduction="none").flatten() for head in heads]
    torch.testing.assert_close(*losses)

    likely = with_head(backbone, Head(likely_kind, options), 0).lm_head
    classes, is_in = likely.chosen(100 * z, targets)
    assert torch.equal(is_in, (100 * z).softmax(-1).gather(-1, classes) > LIKELY)
    assert not is_in.all()


def test_operations_are_counted_whole():
    from cost import operations
    from models import Size, mixture, new_softmax_model, with_head
    from training import Recipe

    batch = torch.randint(V, (4, LENGTH))
    counted = [
        operations(with_head(new_softmax_model(Size(D, 1), V, LENGTH, 0), mixture(K), 0), batch, Recipe(1, 1e-3))
        for K in (1, 5)
    ]
    # Per token and component, a multiplication and an addition: three products with the decoder, for each token but
    # the last of a row, which has no target, and three with the latent's and the prior's projections.
    of_a_component = 2 * 3 * (D * V * (LENGTH - 1) / LENGTH + D * D + D)
    assert counted[1] - counted[0] == pytest.approx(4 * of_a_component, rel=0.1)


def test_training_the_head_alone_leaves_the_backbone():
    from models import Size, mixture, new_softmax_model, with_head
    from training import Recipe, fit

    model = with_head(new_softmax_model(Size(D, 1), V, LENGTH, 0), mixture(2), 0)
    before = {name: tensor.clone() for name, tensor in model.transformer.state_dict().items()}
    decoder = model.lm_head.weight.clone()
    result = fit(model, some_text(), Recipe(3, 1e-2, batch_size=4, train_backbone=False), seed=0, name="")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.transformer.state_dict().items())
    assert not torch.equal(decoder, model.lm_head.weight)
    assert result["steps"] == 3
    assert result["seconds"] > 0


def test_training_to_convergence_ends_with_its_best_weights():
    from models import SOFTMAX, Size, new_softmax_model, with_head
    from training import Recipe, fit

    recipe = Recipe(400, 3e-2, batch_size=10, to_convergence=True, evaluate_every=5, cuts=1)
    model = with_head(new_softmax_model(Size(D, 1), V, LENGTH, 0), SOFTMAX, 0)
    result = fit(model, some_text(), recipe, seed=0, name="")  # of random tokens: it can but learn them by heart
    assert result["stopped_early"]
    assert result["steps"] < 400
    assert result["valid_nats"] == pytest.approx(min(nats for _, _, nats, _ in result["curve"]))


@pytest.mark.parametrize("to_convergence", [False, True])
def test_an_interrupted_training_goes_on_to_the_same_end(to_convergence, monkeypatch, tmp_path):
    """Dropout, the order of the batches, the optimizer and the cuts of the rate are as if nothing had happened."""
    import training
    from models import Size, mixture, new_softmax_model, with_head

    recipe = training.Recipe(23, 3e-2, batch_size=8, to_convergence=to_convergence, evaluate_every=5, measure_every=5)
    file = tmp_path / "kept" / "run.pt"

    def train():
        model = with_head(new_softmax_model(Size(D, 1, dropout=0.1), V, LENGTH, 0), mixture(2), 0)
        result = training.fit(model, some_text(), recipe, seed=0, name="", unfinished=file)
        del result["seconds"]
        return result | {"curve": [(step, *nats) for step, _, *nats in result["curve"]]}

    whole = train()
    assert not file.exists()
    take_step, taken = training.take_step, []

    def interrupted(*arguments):
        if len(taken) == 17:
            raise KeyboardInterrupt
        taken.append(arguments)
        return take_step(*arguments)

    monkeypatch.setattr(training, "take_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train()
    steps = []
    monkeypatch.setattr(training, "take_step", lambda *arguments: steps.append(0) or take_step(*arguments))
    assert train() == whole
    assert len(steps) == whole["steps"] - 15  # from the last point of the curve
    assert [path.name for path in file.parent.iterdir()] == []


@pytest.mark.parametrize("rank", [2, 5])
def test_the_synthetic_language_has_its_rank(rank):
    from synthetic import language

    log_probs = language(40, rank, spread=1.0, seed=0)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(40))
    assert torch.linalg.matrix_rank(log_probs, rtol=1e-5) == rank + 1  # and one for the normalisation


def test_a_wide_enough_softmax_learns_the_synthetic_language_and_a_narrow_one_cannot():
    from models import SOFTMAX
    from synthetic import language, learn

    truth = language(40, 6, spread=2.0, seed=0)
    wide, narrow = (learn(SOFTMAX, hidden_size, truth, steps=400, seed=0)["excess"] for hidden_size in (7, 2))
    assert 0 <= wide < 0.02
    assert narrow > 0.2


def test_an_interrupted_question_is_taken_up_where_it_was(tmp_path):
    from results import Results

    first = Results(tmp_path, "question")
    first.run({"seed": 0}, lambda: {"nats": 1.0})
    with pytest.raises(KeyboardInterrupt):
        first.run({"seed": 1}, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    again = Results(tmp_path, "question")
    assert again.run({"seed": 0}, lambda: pytest.fail("run twice")) == {"nats": 1.0}
    assert again.run({"seed": 1}, lambda: {"nats": 2.0}) == {"nats": 2.0}
    assert [file.name for file in tmp_path.iterdir()] == ["question.json"]
    assert all(run["versions"]["processor"] for run in again.runs)  # whose seconds they are


def test_rank_by_its_command(tmp_path, data_dir):
    arguments = ["--data-dir", data_dir, *TINY, "--num-contexts", "250", "--out", tmp_path / "out"]
    printed = run("rank.py", *arguments)
    runs = json.loads((tmp_path / "out" / "rank.json").read_text())["runs"]
    ranks = {(run["settings"]["head"]["kind"], run["settings"]["head"]["num_mixtures"]): run["result"] for run in runs}
    assert ranks["softmax", 1]["rank"] == D + 1
    assert ranks["contexts", 4]["rank"] <= D + 1
    assert ranks["mixture", 4]["rank"] > D + 1
    assert "| mixture K=15 |" in printed
    assert (tmp_path / "out" / "rank.png").stat().st_size > 0


@pytest.mark.slow
def test_retrofit_by_its_command(tmp_path, data_dir):
    from models import mixture

    arguments = ["--data-dir", data_dir, *TINY, "--checkpoint-steps", "60", "--seeds", "1", "--out", tmp_path / "out"]
    printed = run("retrofit.py", *arguments)
    results = (tmp_path / "out" / "retrofit.json").read_text()
    assert "| contexts K=4 |" in printed
    assert str(data_dir.parent) not in results
    assert (tmp_path / "out" / "retrofit.png").stat().st_size > 0
    assert re.search(r"^\| softmax, hidden size \d+ \| 60 \|", printed, flags=re.MULTILINE)

    run("cards.py", "--results", tmp_path / "out", "--all", "--out", tmp_path / "cards")
    card = (tmp_path / "cards" / "retrofit" / f"mixture-K4-D{D}.md").read_text()
    best = min(
        run["result"]["valid_nats"]
        for run in json.loads(results)["runs"]
        if run["settings"].get("head") == mixture(4).settings
        and run["settings"]["checkpoint"]
        and run["settings"]["recipe"]["train_backbone"]
    )
    assert f"| validation | perplexity per token | {math.exp(best):.2f}".rstrip("0") in card
    assert "| softmax | 8 | 2 |" in card
    assert "python examples/softmax_bottleneck/retrofit.py --data-dir" in card
    folder = re.search(r'from_pretrained\("softmax-bottleneck-out/(models/.+?)"', card)[1]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / folder).config.num_mixtures == 4
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / folder)("the cat").input_ids


@pytest.mark.slow
def test_shortlists_by_their_command(tmp_path, data_dir):
    printed = run("retrofit.py", "--data-dir", data_dir, "--quick", "--shortlists", "--out", tmp_path)
    rows = [line.split("|") for line in printed.splitlines() if line.startswith("| ")]
    assert rows[0][-2].strip() == "share of the gain"
    assert {"mixture K=4", "own tokens too K=4 M=64", "softmax, 4 x steps"} <= {row[1].strip() for row in rows}
    assert "classes, " in printed


def test_the_kept_cards_are_those_of_the_committed_results(tmp_path):
    run("cards.py", "--out", tmp_path)
    committed = SCRIPTS.parents[1] / "model_cards"
    written = {path.relative_to(tmp_path) for path in tmp_path.rglob("*.md")}
    assert written == {path.relative_to(committed) for path in committed.rglob("*.md")} - {Path("template.md")}
    for path in written:
        assert (tmp_path / path).read_text() == (committed / path).read_text()


@pytest.mark.slow
def test_until_convergence_by_its_command_of_the_heads_that_are_asked_for(tmp_path, data_dir):
    arguments = ["--data-dir", data_dir, *TINY, "--max-steps", "50", "--seeds", "1", "--convergence-seeds", "2"]
    printed = run(
        "until_convergence.py", *arguments, "--heads", "softmax", "--heads", "mixture K=4", "--out", tmp_path
    )
    fixed, converged = re.split(r"^From scratch on .*\n", printed, flags=re.MULTILINE)[1:]
    heads = [line.split(" | ")[0].removeprefix("| ") for line in fixed.splitlines()[3:] if line.startswith("|")]
    assert heads[:2] == ["softmax", "mixture K=4"]
    assert re.fullmatch(r"softmax, \d+ steps", heads[2])  # for the seconds of the mixture
    assert "| softmax, patience 4 |" in converged
    assert all(f"| {name}, patience 8 |" in converged for name in ("softmax", "mixture K=4"))
    assert "± " in converged
    runs = json.loads((tmp_path / "until_convergence.json").read_text())["runs"]
    assert {run["settings"]["seed"] for run in runs if "seed" in run["settings"]} == {0, 1}
    assert (tmp_path / "until_convergence.png").stat().st_size > 0

    run("cards.py", "--results", tmp_path, "--all", "--out", tmp_path / "cards")  # of each patience its own
    cards = {card.name for card in (tmp_path / "cards" / "until_convergence").iterdir()}
    assert cards == {f"mixture-K4-D{D}-converged.md", f"mixture-K4-D{D}-converged-patience8.md"}


def test_until_convergence_tries_the_same_learning_rates_for_every_head(tmp_path, data_dir):
    rates = ["--learning-rates", "1e-3", "--learning-rates", "4e-3"]
    arguments = ["--data-dir", data_dir, *TINY, "--seeds", "1", "--convergence-seeds", "0", *rates]
    run("until_convergence.py", *arguments, "--heads", "softmax", "--heads", "mixture K=4", "--out", tmp_path)
    runs = [
        run for run in json.loads((tmp_path / "fixed_steps.json").read_text())["runs"] if "seed" in run["settings"]
    ]
    tried = {}
    for settings in (run["settings"] for run in runs):
        tried.setdefault(settings["head"]["kind"], set()).add(settings["recipe"]["learning_rate"])
    assert tried == {"softmax": {1e-3, 4e-3}, "mixture": {1e-3, 4e-3}}


def test_until_convergence_names_the_heads_that_it_knows(tmp_path, data_dir):
    arguments = ["--data-dir", data_dir, *TINY, "--heads", "mixture K=3", "--out", tmp_path]
    with pytest.raises(AssertionError, match="expected some of softmax, mixture K=1"):
        run("until_convergence.py", *arguments)


def test_where_it_pays_to_convergence_by_its_command(tmp_path, data_dir):
    sizes = ["--hidden-sizes", "4", "--hidden-sizes", "8"]
    arguments = ["--data-dir", data_dir, *TINY[:2], *TINY[4:6], *sizes, "--to-convergence", "--steps", "50"]
    printed = run("where_it_pays.py", *arguments, "--out", tmp_path)
    assert re.search(r"^\| 4 \| \d+ \|", printed, flags=re.MULTILINE)
    runs = json.loads((tmp_path / "where_it_pays_to_convergence.json").read_text())["runs"]
    rates = {
        run["settings"]["size"]["hidden_size"]: run["settings"]["recipe"] for run in runs if "size" in run["settings"]
    }
    assert rates[4]["learning_rate"] == pytest.approx(2**0.5 * rates[8]["learning_rate"])
    assert rates[4]["to_convergence"]


def test_words_are_tokens_and_unknown_ones_are_one(data_dir):
    from text import Source, load_text

    (data_dir / "valid.txt").write_text("the cat sees <unk> zebras\n" * 30)
    text = load_text(Source(data_dir), vocab_size=0, words=True, block_size=6)
    assert text.vocab_size == 11  # nine words, the end of a text and the unknown word
    assert text.tokenizer.convert_ids_to_tokens(text.valid[0].tolist()) == [
        "the", "cat", "sees", "<unk>", "<unk>", "<|endoftext|>",
    ]  # fmt: skip
    assert int(text.train.max()) < text.vocab_size


def test_the_dropout_control_is_the_mixture_but_in_training():
    from models import Head, Size, mixture, new_softmax_model, with_head

    backbone, tokens = new_softmax_model(Size(D, 1), V, LENGTH, 0), torch.randint(V, (3, LENGTH))
    plain, control = (with_head(backbone, head, 0) for head in (mixture(3), Head("dropout", {"num_mixtures": 3})))
    torch.nn.init.normal_(plain.lm_head.shift.weight, std=0.1)
    control.lm_head.load_state_dict(plain.lm_head.state_dict())
    with torch.no_grad():
        expected = plain.eval()(input_ids=tokens, labels=tokens).loss
        torch.testing.assert_close(control.eval()(input_ids=tokens, labels=tokens).loss, expected)
        assert (control.train()(input_ids=tokens, labels=tokens).loss - expected).abs() > 1e-4


def test_a_text_that_is_not_there_is_named():
    import typer
    from text import Source

    with pytest.raises(typer.BadParameter, match=r"expected a file, given nowhere/train\.txt"):
        Source(data_dir=Path("nowhere"))


@pytest.fixture
def pretrained(tmp_path, data_dir):
    """A folder with a tiny Llama and its tokenizer."""
    from text import Source, load_text
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "llama"
    tokenizer = load_text(Source(data_dir), vocab_size=300).tokenizer
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_heads_of_a_real_model_by_its_command(tmp_path, data_dir, pretrained):
    from models import Head

    arguments = ["--model", pretrained, "--data-dir", data_dir, "--steps", "2", "--seeds", "2", "--out", tmp_path]
    printed = run("real_model.py", *arguments)
    heads = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")][2:]
    assert heads[:2] == ["as it is", "softmax"]
    assert {"contexts K=4", "rescored K=2 M=64", "mixture K=16 M=64 shift_rank=128"} <= set(heads)
    assert {"mixture K=16 M=256 shift_rank=1000000", "mixture K=16 shift_rank=1000000"} <= set(heads)
    runs = json.loads((tmp_path / "real_model.json").read_text())["runs"]
    base, *trained = runs
    assert base["settings"]["base"] == "llama"
    tried = {run["settings"]["recipe"]["learning_rate"] for run in trained if run["settings"]["seed"] == 0}
    assert tried == {3e-4, 1e-3, 3e-3}
    assert {run["settings"]["seed"] for run in trained} == {0, 1}
    at_seed_0 = [run for run in trained if run["settings"]["seed"] == 0]
    for head in heads[1:]:
        nats = {
            run["result"]["valid_nats"]
            for run in at_seed_0
            if Head.from_settings(run["settings"]["head"]).name == head.replace("softmax", "mixture K=1")
        }
        assert len(nats) == 3, f"{head}: the learning rates change nothing"
    assert (tmp_path / "real_model.png").stat().st_size > 0


def test_one_head_of_a_real_model_and_an_unknown_one(tmp_path, data_dir, pretrained):
    arguments = ["--model", pretrained, "--data-dir", data_dir, "--steps", "2", "--seeds", "1", "--out", tmp_path]
    printed = run("real_model.py", *arguments, "--heads", "mixture K=2")
    assert [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")][2:] == [
        "as it is",
        "mixture K=2",
    ]
    with pytest.raises(AssertionError, match="--heads: head: expected a kind of softmax"):
        run("real_model.py", *arguments, "--heads", "tree K=3")


def test_learning_rates_of_a_real_model_by_their_command(tmp_path, data_dir, pretrained):
    arguments = ["--model", pretrained, "--data-dir", data_dir, "--steps", "2", "--out", tmp_path]
    printed = run("learning_rates.py", *arguments)
    rows = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")][2:]
    assert rows[:2] == ["softmax", "mixture, scale 1"]
    assert len(rows) == 5
    assert not [*tmp_path.glob("models/*")]  # a copy of a pretrained model for each run would fill the disk
    assert (tmp_path / "learning_rates-32.png").stat().st_size > 0


def test_adapters_of_a_real_model_by_their_command(tmp_path, data_dir, pretrained):
    pytest.importorskip("peft")
    arguments = ["--model", pretrained, "--data-dir", data_dir, "--quick", "--adapters", "--out", tmp_path]
    printed = run("real_model.py", *arguments)
    heads = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| LoRA")]
    assert [head for head in heads if head != "LoRA 8, softmax, its seconds"] == [
        "LoRA 8, softmax",
        "LoRA 8, mixture K=4 M=64",
        "LoRA 8, mixture K=4 M=64 latent_scale=0.1",
        "LoRA 8, mixture K=16 M=64 latent_scale=0.1 shift_rank=1000000",
        "LoRA 8, mixture K=4 latent_scale=0.1",
    ]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks for it
def test_all_of_a_head_trains_beside_an_adapter(pretrained):
    pytest.importorskip("peft")
    from models import mixture
    from real_model import Study

    adapted = Study(pretrained, None, None, None, None, lora_rank=8).make(mixture(4, shift_rank=2), 0)
    trains = {name for name, weight in adapted.named_parameters() if weight.requires_grad and "lora_" not in name}
    assert {name.partition("lm_head.")[2] for name in trains} == {"prior.weight", "shift.weight", "widening.weight"}


@pytest.mark.parametrize("question", ["real_model", "from_scratch"])
def test_a_kept_run_has_the_head_of_its_name(question):
    """A default that changes must not change what the name of a kept run means."""
    from hf_mos.remote_code.configuration_mos import default_rank

    runs = json.loads((SCRIPTS / "results" / f"{question}.json").read_text())["runs"]
    runs = [run for run in runs if "parameters" in run["result"] and "lora_rank" not in run["settings"]]
    parameters = {(576, 49152): 134_515_008}  # of softmax models; SmolLM2-135M
    checked = 0
    for run in sorted(runs, key=lambda run: run["settings"]["head"]["kind"], reverse=True):  # softmax first
        settings, head = run["settings"], run["settings"]["head"]
        size = (settings["size"]["hidden_size"], settings["vocab_size"]) if "size" in settings else (576, 49152)
        if head["kind"] == "softmax":
            parameters[size] = run["result"]["parameters"]
        elif head["kind"] == "mixture":
            K, D = head["num_mixtures"], size[0]
            rank = min(head.get("shift_rank") or default_rank(K, *size), D)
            new = K * D + K * rank * D + (rank * D if rank < D else 0)
            assert run["result"]["parameters"] == parameters[size] + new, (head, run["versions"])
            checked += 1
    assert checked > 10


@pytest.mark.parametrize("nats", [[3, 2, 1, 2, 3], [1, 2, 3, 4, 5], [5, 4, 3, 2, 1], [2, 1, 2], [1, 2], [2, 1], [1]])
def test_the_search_finds_the_best_of_rates_with_one_minimum(nats):
    from search import best_rate

    tried = []
    best = best_rate(range(len(nats)), lambda rate: tried.append(rate) or nats[rate])
    assert nats[best] == min(nats)
    if len(nats) == 1:
        assert not tried  # a single rate needs no run
    if nats == [3, 2, 1, 2, 3]:
        assert set(tried) == {1, 2, 3}


@pytest.mark.slow
def test_from_scratch_goes_on_and_reports(tmp_path, data_dir):
    data = ["--train-file", data_dir / "train.txt", "--validation-file", data_dir / "valid.txt", "--out", tmp_path]
    sizes = ["--vocab-size", "300", "--hidden-size", str(D), "--tokens", "2048", "--seeds", "1"]
    heads = ["--heads", "softmax", "--heads", "mixture K=4 M=8 latent_scale=0.5"]
    first = run("from_scratch.py", *data, *sizes, *heads, "--rates", "1e-3")
    run("from_scratch.py", *data, *sizes, *heads, "--rates", "1e-3", "--rates", "2e-3")
    runs = json.loads((tmp_path / "from_scratch.json").read_text())["runs"]
    tried = [(run["settings"]["head"]["kind"], run["settings"]["recipe"]["learning_rate"]) for run in runs]
    assert tried == [("softmax", 1e-3), ("mixture", 1e-3), ("softmax", 2e-3), ("mixture", 2e-3)]
    assert runs[1]["settings"]["head"]["latent_scale"] == 0.5
    assert runs[0]["result"]["steps"] == 1
    again = run("from_scratch.py", *data, *sizes, *heads, "--rates", "1e-3", "--report")
    assert again == first
    assert "| mixture K=4 M=8 latent_scale=0.5 | 0.001 |" in first
    assert list(tmp_path.glob("from_scratch-D8-V300-2048.png"))


def test_a_head_by_its_name():
    from from_scratch import HEADS
    from models import SOFTMAX, Head, mixture

    assert Head.from_name("softmax") == SOFTMAX
    assert [Head.from_name(name).name for name in HEADS] == HEADS
    given = mixture(16, shortlist_size=64, latent_scale=0.25)
    assert Head.from_name(given.name) == given
    with pytest.raises(ValueError, match="expected a kind of softmax"):
        Head.from_name("softmix K=4")
