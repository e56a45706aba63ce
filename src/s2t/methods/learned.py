"""Which model answers, learned from finished answers of other problems, with scikit-learn, which is imported by what learns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from s2t.methods.answers import Answers, Cascade, Chooser, Known, paid

NUM_NEIGHBOURS = 16


class FrugalGPT(Cascade):
    """A cascade whose score is learned: logistic regression of being right on confidence, length and whether there is an answer.

    Source: Chen, Zaharia, Zou 2023 (arXiv 2305.05176), with two models and a scorer of our own features.
    """

    default = 0.5
    reads = "frugalgpt"
    learns = True

    def learn(self, known: Known) -> None:
        from sklearn.dummy import DummyClassifier
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        rows = [_features(answers["confidence"]) for answers in known.answers]
        right = [bool(answers["confidence"]["is_correct"]) for answers in known.answers]
        is_one_sided = len(set(right)) == 1  # nothing to tell apart: all are as likely
        scorer = DummyClassifier() if is_one_sided else LogisticRegression()
        self.scorer = make_pipeline(StandardScaler(), scorer).fit(rows, right)

    def score(self, answer: Mapping[str, Any]) -> float:
        [probs] = self.scorer.predict_proba([_features(answer)])
        return float(dict(zip(self.scorer.classes_, probs, strict=True)).get(True, 0.0))


class NearestNeighbours(Chooser):
    """The model is chosen before it writes: the LLM where it was right so much more often on the K most similar known questions.

    Source: Shnitzer et al. 2023 (arXiv 2309.15789), kNN on questions; similarity is the cosine of words weighted by rarity.
    """

    default = 0.0
    reads = "knn-routing"
    learns = True
    num_neighbours = NUM_NEIGHBOURS

    def learn(self, known: Known) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.neighbors import KNeighborsRegressor

        self.words = TfidfVectorizer(analyzer=_words)  # type: ignore[arg-type]
        gains = [float(a["llm"]["is_correct"]) - float(a["confidence"]["is_correct"]) for a in known.answers]
        self.neighbours = KNeighborsRegressor(metric="cosine")
        self.neighbours.fit(self.words.fit_transform(known.questions), gains)

    def gain(self, question: str) -> float:
        """How much more often the LLM was right on the most similar questions."""
        count = min(self.num_neighbours, self.neighbours.n_samples_fit_)
        self.neighbours.set_params(n_neighbors=count)
        return float(self.neighbours.predict(self.words.transform([question]))[0])

    def choose(self, question: str, answers: Answers) -> dict[str, Any]:
        chosen = answers["llm" if self.gain(question) > self.threshold else "confidence"]
        return paid(chosen, [chosen])


def _features(answer: Mapping[str, Any]) -> list[float]:
    return [answer["value"], math.log1p(answer["cost"]["generated"]), float(answer["extracted"] is not None)]


def _words(question: str) -> list[str]:
    return question.lower().split()
