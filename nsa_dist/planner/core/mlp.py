"""What stands behind the attention of a layer on one rank: an MLP, or experts and their router."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerMLP:
    """Widths are those of a tensor-parallel rank. What is saved does not depend on how evenly experts are taken."""

    hidden_size: int
    width: int  # of the MLP, or of an expert
    num_experts: int = 0  # 0: one MLP
    topk: int = 0
    shared_width: int = 0

    @property
    def parameters(self) -> int:
        """Gate, up and down of every MLP; the router, whole on every rank."""
        columns = self.width * (self.num_experts or 1) + self.shared_width
        return self.hidden_size * (3 * columns + self.num_experts)

    @property
    def active_parameters(self) -> int:
        """What multiplies one token."""
        return self.hidden_size * (3 * self.columns + self.num_experts)

    @property
    def columns(self) -> int:
        """That one token passes through."""
        return self.width * (self.topk or 1) + self.shared_width

    def saved_bytes(self, tokens: int, routed: int, samples: int, e: int) -> int:
        """Of one forward, beside what it reads, the norm's output: `routed` of `tokens` go through this rank's router.

        samples     of the micro batch, each of which has a loss of balance
        e           bytes of an element
        """
        gated = 5 * e  # a column: gate and up, silu(gate), up + 0, their product
        if not self.num_experts:
            return tokens * gated * self.width
        taken = 8 + 4 + (self.hidden_size + self.width) * e  # its place and weight; its input; the weighed product
        chosen = (4 + 1) * self.num_experts  # weights and choices by expert
        by_token = chosen + self.topk * (taken + gated * self.width) + gated * self.shared_width
        return routed * self._routed_bytes(samples, e) + tokens * by_token + self._router_bytes(samples, e)

    def _routed_bytes(self, samples: int, e: int) -> int:
        """Of a token in the router: a softmax over all, which it takes, the softmax over them, whose sample it is of.

        In 16 bits the router reads a copy in fp32, and the norm's output is kept for a shared expert alone.
        """
        scores = 4 * self.num_experts + self.topk * (8 + 4) + 4 * samples
        if e == 4:
            return scores
        return scores + 4 * self.hidden_size - (0 if self.shared_width else e * self.hidden_size)

    def _router_bytes(self, samples: int, e: int) -> int:
        """Whatever the tokens are: counts by sample, the loss, in 16 bits its weights in fp32."""
        return 4 * (samples * self.num_experts + 1 + (self.hidden_size * self.num_experts if e == 2 else 0))

    def moment_bytes(self, tokens: int, e: int) -> int:
        """The most that is there while backward goes through it, beside what was saved."""
        if not self.num_experts:
            return tokens * 5 * e * self.width
        taken = tokens * self.topk
        of_one = 5 * self.width * taken // self.num_experts
        return e * (2 * taken * self.hidden_size + max(of_one, 5 * tokens * self.shared_width))

    def moved_bytes(self, e: int) -> int:
        """That elementwise operations read and write of a token forward: SwiGLU; dealing it out, and adding up."""
        return e * (8 * self.columns + 4 * self.topk * self.hidden_size) + 12 * self.num_experts
