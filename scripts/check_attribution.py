"""Does a document's share of a token's probability tell what would happen without the document?

    python scripts/check_attribution.py CORPUS/*.jsonl.zst --model MODEL > attribution.json

Restricted text of the training split is in a store; passages of the test split are read beside it. At some positions,
for each of the documents with the largest shares, the change of log p is predicted from what the mixture knows, and
compared with the change that is seen when the document is denied (which is exact: a view equals a store without it):

- by the share: log(p - share) - log(p), which forgets that the others then divide the weight among them;
- by what is left (:mod:`silo.leaving`): what the mixture says of the document's leaving when it explains a text. Of
  documents that matter little it says nothing; how much these changed is told apart.

Weights λ are fixed.

Prints one JSON document: machine, command, commit, seed, data hash, result.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from compare_at_equal_text import build, say, split
from recording import made

from datastore.store import Selection, Store
from eval.perplexity import Text, sample
from silo.language_model import LanguageModel
from silo.leaving import Leaving, concerned
from silo.mixture import Mixture
from silo.weights import Weights

WEIGHTS = Weights({"lm": 0.4, "knn": 0.3, "ngram": 0.3}, 4.0)
DOCUMENTS_A_TOKEN = 3
Pair = dict[str, Any]


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--model", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--store-tokens", default=50_000, show_default=True, help="Of each restricted domain.")
@click.option("--texts", default=12, show_default=True, help="Passages of each restricted domain.")
@click.option("--every", default=16, show_default=True, help="One of so many positions is looked at.")
@click.option("--documents", default=120, show_default=True, help="So many documents are denied, each by itself.")
def main(files: tuple[Path, ...], model: Path, store_tokens: int, texts: int, every: int, documents: int) -> None:
    """Compare, and print one JSON document."""
    lm = LanguageModel.load(model)
    permissive, restricted = split(files)
    with tempfile.TemporaryDirectory(prefix="silo-attribution-") as directory:
        store = build(Path(directory) / "store", lm, model, permissive, restricted, (store_tokens, 0), 60_000)
        mixture = store.mixture(lm, WEIGHTS.methods)
        asked = [text for domain in restricted.values() for text in sample(domain["test"], mixture, texts * 384)]
        pairs = list(predicted(mixture, asked, every))
        by_document: dict[str, list[Pair]] = {}
        for pair in pairs:
            by_document.setdefault(pair["document"], []).append(pair)
        chosen = sorted(by_document, key=lambda id: -len(by_document[id]))[:documents]
        say(f"{len(pairs)} pairs of {len(by_document)} documents; {len(chosen)} are denied")
        for id in chosen:
            observe(store, lm, asked, id, by_document[id])
    observed = [pair for id in chosen for pair in by_document[id]]
    seen = [pair for pair in observed if pair["left"] is not None]
    untold = [abs(pair["seen"]) for pair in observed if pair["left"] is None]
    report = {
        **made(files),
        "result": {
            "pairs": len(seen),
            "documents": len(chosen),
            "weights": WEIGHTS.to_json(),
            "correlation": {way: correlation(seen, way) for way in ("share", "left")},
            "greatest_error": {way: greatest_error(seen, way) for way in ("share", "left")},
            "greatest_error_of_sums": max(pair["error_of_sum"] for pair in observed),
            "not_told": {"pairs": len(untold), "greatest_change": max(untold, default=0.0)},
        },
    }
    print(json.dumps(report, indent=1))


def correlation(pairs: list[Pair], way: str) -> float:
    """Pearson's, between predicted and seen changes of log p."""
    return float(np.corrcoef([pair[way] for pair in pairs], [pair["seen"] for pair in pairs])[0, 1])


def greatest_error(pairs: list[Pair], way: str) -> float:
    """By how many nats a predicted change is off, at most."""
    return max(abs(pair[way] - pair["seen"]) for pair in pairs)


def predicted(mixture: Mixture, texts: list[Text], every: int) -> Iterator[Pair]:
    """Predictions for the documents with the largest shares of sampled tokens."""
    for number, parts in mixture.read([text.tokens for text in texts]):
        tokens = texts[number].tokens
        leaving = Leaving(parts, tokens, WEIGHTS, concerned([parts], tokens))
        mixed = parts.distribution(WEIGHTS)
        for index in range(0, parts.end - parts.begin, every):
            token = int(tokens[parts.begin + index])
            shares = mixture.attribute(parts, index, token, WEIGHTS)
            of_document: dict[str, float] = {}
            for share in shares:
                if share.document is not None:
                    of_document[share.document.id] = of_document.get(share.document.id, 0.0) + share.probability
            p = float(mixed[index, token])
            error = abs(p - math.fsum(share.probability for share in shares))
            left = {document.id: without for document, without in leaving.at(index).items()}
            for id in sorted(of_document, key=lambda id: -of_document[id])[:DOCUMENTS_A_TOKEN]:
                yield {
                    "text": number,
                    "position": parts.begin + index,
                    "document": id,
                    "share": math.log(max(p - of_document[id], 1e-12)) - math.log(p),
                    "left": math.log(left[id]) - math.log(p) if id in left else None,
                    "p": p,
                    "error_of_sum": error,
                }


def observe(store: Store, lm: LanguageModel, texts: list[Text], id: str, pairs: list[Pair]) -> None:
    """Read the texts again without a document, and note the change of log p that is seen."""
    mixture = store.mixture(lm, WEIGHTS.methods, deny=Selection(documents=(id,)))
    for number in sorted({pair["text"] for pair in pairs}):
        for parts in mixture.parts(texts[number].tokens):
            mixed = parts.distribution(WEIGHTS)
            for pair in pairs:
                if pair["text"] == number and parts.begin <= pair["position"] < parts.end:
                    token = int(texts[number].tokens[pair["position"]])
                    pair["seen"] = math.log(float(mixed[pair["position"] - parts.begin, token])) - math.log(pair["p"])


if __name__ == "__main__":
    main()
