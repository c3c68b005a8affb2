"""One loop that prefills and decodes many requests with one model, pass by pass.

Every request keeps its own keys and values, so a pass can hold any of them, each with any number of
tokens: attention runs request by request, everything else on the tokens of all. Its router has run
on a request's next tokens before they are scheduled, so the experts of whatever is ready are known.

Shapes: N tokens of one request, T tokens of a pass, D model width, K slots per token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Sequence
from itertools import accumulate

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from fissile.errors import UsageError
from fissile.models.modeling_fissile import FissileDecoderLayer, FissileForCausalLM, build_context
from fissile.serve.batching import Choice, Limits, Scheduler
from fissile.serve.requests import (
    Outlook,
    PassRecord,
    Request,
    Routes,
    Running,
    Token,
    cut,
    expert_set,
    joined,
    needs_of,
)
from fissile.serve.store import ExpertStore, Needs


class Engine:
    """Runs requests on a model.

    Args:
        model: in evaluation mode; its experts in memory, or taken from `store`.
        store: told beforehand what each pass needs; None where everything is in memory.
        scheduler: chooses what shares a pass.
        limits: of a pass.
        horizon: passes after the current one that the store is told about, as far as the scheduler
            can tell from what is ready.
        pool: most requests under way; others wait outside, by arrival.
        record: called with every pass.

    Attributes:
        passes: number of the next pass.
        waited: longest wait of each finished request, in passes.
    """

    def __init__(
        self,
        model: FissileForCausalLM,
        store: ExpertStore | None,
        scheduler: Scheduler,
        limits: Limits,
        *,
        horizon: int = 4,
        pool: int = 256,
        record: Callable[[PassRecord], None] | None = None,
        pick: Callable[[int, Tensor], int] | None = None,
    ) -> None:
        self.model, self.store, self.config = model, store, model.config
        self._scheduler, self._limits = scheduler, limits
        self._horizon, self._pool = horizon, pool
        self._record, self._pick = record, pick or _greedy
        self._experts = self.config.num_experts
        self.passes = 0
        self.waited: dict[int, int] = {}
        self._running: dict[int, Running] = {}

    def run(self, requests: Iterable[Request]) -> Generator[Token, None, None]:
        """Generate, token by token, in the order in which tokens become known.

        Raises:
            UsageError: a request that is empty, longer than the model's context, or there twice.
            CorruptCheckpoint: the artifact was changed meanwhile.
        """
        waiting = sorted(requests, key=lambda r: (r.arrival, r.ident))
        for request in waiting:
            self._check(request)
        if len({request.ident for request in waiting}) < len(waiting):
            raise UsageError("two requests have the same ident")
        while waiting or self._running:
            if not self._running:
                self.passes = max(self.passes, waiting[0].arrival)
            while waiting and waiting[0].arrival <= self.passes and len(self._running) < self._pool:
                self._start(waiting.pop(0))
            yield from self._step()

    def _check(self, request: Request) -> None:
        longest = self.config.max_position_embeddings
        if not request.prompt or request.limit < 1:
            raise UsageError(f"request {request.ident}: no prompt, or nothing to generate")
        if len(request.prompt) + request.limit > longest:
            raise UsageError(
                f"request {request.ident}: {len(request.prompt)} tokens and {request.limit} to "
                f"generate, the model's context is {longest}"
            )

    def _start(self, request: Request) -> None:
        ids_1N = torch.tensor([request.prompt], device=self.model.device)
        cache = DynamicCache(config=self.config)
        outlook = self._route(request, ids_1N, cache, 0)
        self._running[request.ident] = Running(outlook, cache, ids_1N)

    @torch.inference_mode()
    def _route(self, request: Request, ids_1N: Tensor, cache: DynamicCache, done: int) -> Outlook:
        """Let the router, if it runs before layer 0, decide about the next tokens."""
        body = self.model.model
        embeds = body.embed_tokens(ids_1N)
        context = build_context(self.config, body.rotary_emb, embeds, past_key_values=cache)
        routes = body.route(embeds, ids_1N, context)
        experts = expert_set(needs_of(routes), self._experts)
        return Outlook(request, routes, experts, ids_1N.shape[1], done, self.passes)

    def _step(self) -> list[Token]:
        begin, now = time.perf_counter(), self.passes
        units = [running.next.unit(now) for running in self._running.values()]
        resident = self._resident()
        choice = self._scheduler(units, self._limits, resident)
        rows = [(self._running[ident], tokens) for ident, tokens in choice]
        records = [running.row(tokens) for running, tokens in rows]
        routes = joined([record.routes for record in records])
        needs = needs_of(routes)
        if self.store is not None:
            self.store.begin([needs, *self._forecast(choice, resident)] if needs else [])
        for running, _ in rows:
            running.longest = max(running.longest, now - running.next.ready)
        found = self._forward(rows, routes)
        self.passes += 1
        tokens = [token for row in rows if (token := self._advance(*row, found)) is not None]
        if self._record is not None:
            total = sum(record.tokens for record in records)
            self._record(PassRecord(now, records, needs, total, time.perf_counter() - begin))
        return tokens

    def _resident(self) -> int:
        if self.store is None:
            return 0
        experts, mask = self._experts, 0
        for (layer, expert), planes in self.store.resident().items():
            if planes >= self.store.widths.planes(layer, expert):
                mask |= 1 << (layer * experts + expert)
        return mask

    def _forecast(self, choice: Choice, resident: int) -> list[Needs]:
        """Needs of the passes to come if nothing new arrives and each next token chooses as the
        last one did: routers keep their choice from token to token."""
        ahead = {ident: running.next for ident, running in self._running.items()}
        found: list[Needs] = []
        for number in range(1, self._horizon + 1):
            for ident, tokens in choice:
                ahead[ident] = ahead[ident].after(tokens, self.passes + number, self._experts)
            units = [o.unit(self.passes + number) for o in ahead.values() if o.pending]
            if not units:
                break
            choice = self._scheduler(units, self._limits, resident)
            found.append(needs_of(joined([cut(ahead[i].routes, 0, n) for i, n in choice])))
        return found

    @torch.inference_mode()
    def _forward(self, rows: Sequence[tuple[Running, int]], routes: Routes) -> dict[int, Tensor]:
        """Run a pass; logits (V,) of the requests whose pending tokens are all done."""
        body = self.model.model
        embeds = [body.embed_tokens(running.ids[:, :tokens]) for running, tokens in rows]
        contexts = [
            build_context(self.config, body.rotary_emb, e, past_key_values=running.cache)
            for e, (running, _) in zip(embeds, rows, strict=True)
        ]
        sizes = [tokens for _, tokens in rows]
        hidden_1TD = torch.cat(embeds, dim=1)
        for layer, route in zip(body.layers, routes, strict=True):
            assert isinstance(layer, FissileDecoderLayer)
            parts = hidden_1TD.split(sizes, dim=1)
            attended = [layer.attend(x, c) for x, c in zip(parts, contexts, strict=True)]
            residual_1TD = torch.cat(attended, dim=1)
            y_1TD = layer.mlp(layer.mlp_input(residual_1TD), route)
            hidden_1TD = layer.combine(residual_1TD, y_1TD)
        ends, done = [end - 1 for end in accumulate(sizes)], {}
        for (running, tokens), end in zip(rows, ends, strict=True):
            if tokens == running.next.pending:
                done[running.next.request.ident] = end
        if not done:
            return {}
        logits_1BV = self.model.logits(body.norm(hidden_1TD[:, [*done.values()]]))
        return dict(zip(done, logits_1BV[0], strict=True))

    def _advance(self, running: Running, tokens: int, found: dict[int, Tensor]) -> Token | None:
        """What becomes of a request after `tokens` of it were computed."""
        request = running.next.request
        if request.ident not in found:
            running.ids = running.ids[:, tokens:]
            running.next = running.next.after(tokens, self.passes, self._experts)
            return None
        token = self._pick(request.ident, found[request.ident])
        generated = running.next.generated + 1
        stopped = token in request.stop
        last = stopped or generated == request.limit
        if last:
            del self._running[request.ident]
            self.waited[request.ident] = running.longest
        else:
            running.ids = torch.tensor([[token]], device=self.model.device)
            running.next = self._route(request, running.ids, running.cache, generated)
        return Token(request.ident, None if stopped else token, last)


def _greedy(_request: int, logits_V: Tensor) -> int:
    return int(logits_V.argmax())
