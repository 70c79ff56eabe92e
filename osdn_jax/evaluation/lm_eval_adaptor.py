"""A model of this package as a model of lm-evaluation-harness (the library lm_eval, of the extra `eval`)."""

from collections.abc import Callable, Sequence
from typing import Any

from osdn_jax._optional import require
from osdn_jax.evaluation.text_model import TextModel

_TemplateLM: Any = require("lm_eval.api.model", "eval", "osdn_jax.evaluation.lm_eval_adaptor").TemplateLM


class LmEvalModel(_TemplateLM):
    """A `TextModel` as an `lm_eval.api.model.LM`, to give to `lm_eval.simple_evaluate(model=…)`.

    Args:
        model: the model and how it reads texts.
        about: what is known about it, for the "config" of the results. Default: nothing.
        progress: called with the number of requests that are done since its last call.

    Example:
        run = load_trained("runs/osdn")
        model = TextModel(run.apply, run.parameters, run.tokenizer, max_length=run.config.sequence_length)
        results = lm_eval.simple_evaluate(model=LmEvalModel(model), tasks=["wikitext"])
    """

    def __init__(
        self,
        model: TextModel,
        *,
        about: dict[str, Any] | None = None,
        progress: Callable[[int], object] = lambda done: None,
    ) -> None:
        """Wrap the model."""
        super().__init__()
        self.text_model, self._about, self._progress = model, dict(about or {}), progress

    @property
    def eot_token_id(self) -> int:
        """The token before every document, which also ends one."""
        return self.text_model.tokenizer.bos_id

    @property
    def prefix_token_id(self) -> int:
        """The token that a text without a context follows: the start of a document."""
        return self.text_model.tokenizer.bos_id

    @property
    def max_length(self) -> int:
        """Tokens of a window."""
        return self.text_model.max_length

    @property
    def tokenizer_name(self) -> str:
        """The name that tells tokenizers apart."""
        return self.text_model.tokenizer.fingerprint

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm_eval adds to the "config" of its results."""
        return dict(self._about)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        """Return the tokens of a text."""
        return self.text_model.encode(string, start_token=add_special_tokens)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-likelihood, greedy) of the continuation of each request's (context, continuation)."""
        pairs = [request.args for request in requests]
        return self._loglikelihood_tokens([(pair, *self.text_model.encode_pair(*pair)) for pair in pairs])

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **unused: Any
    ) -> list[tuple[float, bool]]:
        scores = self.text_model.score_tokens([(context, after) for _, context, after in requests], self._progress)
        results = [(score.log_likelihood, score.greedy) for score in scores]
        for (pair, _, _), result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, result)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each request's whole text."""
        texts = [request.args[0] for request in requests]
        totals = self.text_model.score_rolling(texts, self._progress)
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each request's (context, settings)."""
        given = [request.args for request in requests]
        texts = self.text_model.generate(given, self._progress)
        for arguments, text in zip(given, texts, strict=True):
            self.cache_hook.add_partial("generate_until", arguments, text)
        return texts
