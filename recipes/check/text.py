"""``leanstep check``: network, text source, tokenizer, and the number of epochs."""

from pathlib import Path

from leanstep.recipes.check.sections import Facts, Section
from leanstep.recipes.config.schema import RunConfig, accumulation_steps, targets_note
from leanstep.recipes.data.hub import check_hub, from_hub, is_folder_name, offline, offline_recipes, unreachable
from leanstep.recipes.data.tokens import trained_size, vocabulary_size

LOAD_LIMIT = 64 * 2**20  # local text up to this size is tokenised to count its tokens; the run finds it in the cache


def network(config: RunConfig, section: Section, facts: Facts) -> None:
    """List what the run takes from the hub and ask once whether the hub answers; later sections do not ask again."""
    base = config.model.init_from
    if base and is_folder_name(base) and not Path(base).expanduser().exists():
        section.problems.append(f"model.init_from: the folder '{base}' does not exist; train what writes it first")
    wanted = from_hub(config)
    if not wanted:
        return
    section.add("from the hub", ", ".join(f"{name} ({key})" for key, name in wanted.items()))
    reason = unreachable()
    if reason is None:
        section.add("hub", "can be reached")
        return
    facts.offline = True
    with offline():
        missing = {key: name for key, name in wanted.items() if not _is_cached(key, name)}
    section.add("hub", f"cannot be reached ({reason})")
    section.add("offline recipes", ", ".join(offline_recipes()))
    if missing:
        names = ", ".join(f"{name} ({key})" for key, name in missing.items())
        section.problems.append(
            f"needs the network: {names}; offline recipes: {', '.join(offline_recipes())}; or copy the data here and "
            "set data.source, data.path and data.tokenizer"
        )


def _is_cached(key: str, name: str) -> bool:
    """Whether a tokenizer or a model is in the hub's cache. Datasets tell only when they are opened: False."""
    from huggingface_hub import try_to_load_from_cache

    files = {"data.tokenizer": ("tokenizer.json", "tokenizer_config.json"), "model.init_from": ("config.json",)}
    return any(isinstance(try_to_load_from_cache(name, file), str) for file in files.get(key, ()))


def text(config: RunConfig, section: Section, facts: Facts) -> None:
    """Check that the text can be read, that the tokenizer opens, and that its vocabulary fits the model."""
    data = config.data
    unknown = (
        facts.offline and "data.tokenizer" in from_hub(config) and not _is_cached("data.tokenizer", data.tokenizer)
    )
    if unknown:
        section.add("tokenizer", f"{data.tokenizer}, not in the hub's cache: its vocabulary is not known")
    else:
        facts.vocabulary = _vocabulary(config)
        at_most = "" if trained_size(data.tokenizer) is None else "at most "
        section.add("tokenizer", f"{data.tokenizer}, {at_most}{facts.vocabulary:,} tokens")
    wanted = config.model.config.get("vocab_size")
    if wanted is not None:
        section.add("model", f"vocabulary of {wanted:,}")
    if wanted is not None and facts.vocabulary > wanted:
        section.problems.append(
            f"the tokenizer {data.tokenizer} produces {facts.vocabulary:,} tokens, model.config.vocab_size is "
            f"{wanted:,}; raise it, or leave it out to take the tokenizer's"
        )
    if data.source == "hf":
        if facts.offline:
            section.add("source", f"hub dataset {data.name}, not looked for")
            return
        check_hub(data.name or "")
        section.add("source", f"hub dataset {data.name} is there")
        return
    if data.streaming or unknown or _text_size(config) > LOAD_LIMIT:
        from leanstep.recipes.data.sources import open_corpus, open_stream

        if data.streaming:
            open_stream(data)
        else:
            open_corpus(data)
        section.add("source", f"{data.source} {data.path}, read as text; its tokens are not counted here")
        return
    from leanstep.recipes.data.sequences import load_data

    loaded = load_data(data, seed=config.seed, rank=0, world_size=1)
    for name, fact in loaded.facts.items():
        if name != "tokenizer":
            section.add(name, fact)
    facts.train_sequences = len(loaded.train)
    size = vocabulary_size(loaded.tokenizer)
    if size < facts.vocabulary:
        section.add("trained to", f"{size:,} tokens: the text gives no more")
        facts.vocabulary = size


def _vocabulary(config: RunConfig) -> int:
    """Number of token ids that the model must have."""
    from leanstep.recipes.data.tokens import open_tokenizer

    size = trained_size(config.data.tokenizer)
    return size if size is not None else vocabulary_size(open_tokenizer(config.data.tokenizer))


def _text_size(config: RunConfig) -> int:
    """Bytes of the local text on disk; 0 for the sample text, which is small."""
    if config.data.source == "sotu" or not config.data.path:
        return 0
    from leanstep.recipes.data.sources import find_files

    return sum(file.stat().st_size for file in find_files(config.data.path, config.data.source))


def length(config: RunConfig, world_size: int, section: Section, facts: Facts) -> None:
    """Count steps, tokens and epochs."""
    batch, seq_len = config.batch, config.data.seq_len
    accumulation = accumulation_steps(config, world_size)
    sequences = batch.tokens_per_step // seq_len
    section.add("steps", f"{config.steps:,}")
    section.add("tokens", f"{config.steps * batch.tokens_per_step:,} ({batch.tokens_per_step:,} a step)")
    section.add(
        "one step",
        f"{sequences} sequences of {seq_len}: {world_size} process{'es' if world_size > 1 else ''} x {accumulation} "
        f"passes x {batch.micro_batch_size} sequences",
    )
    section.add("targets", targets_note(seq_len))
    if facts.train_sequences is None:
        section.add("epochs", "unknown: the text has not been counted")
        return
    section.add("epochs", f"{config.steps * sequences / facts.train_sequences:.2f}")
    if facts.train_sequences < sequences:
        section.problems.append(
            f"one step takes {sequences} sequences, the text has {facts.train_sequences}; lower batch.tokens_per_step "
            "or give more text"
        )
