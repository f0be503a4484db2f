"""The network that is trained: embedding, recurrent network, readout.

Shapes: B batch, T steps, I input, H hidden, C outputs.
"""

from torch import Tensor, nn

from skiprnn.data.base import SequenceData
from skiprnn.model.recurrent import Recurrent
from skiprnn.training.config import ModelConfig


class Network(nn.Module):
    """Embedding of token ids if the data are text, recurrent network, then a linear layer on its last valid state.

    Args:
        model: cell, policy and sizes.
        data: gives I, C, and what an embedding starts from.
        engine: who runs the time loop.
    """

    def __init__(self, model: ModelConfig, data: SequenceData, engine: str = "auto"):
        super().__init__()
        self.embedding, input_size = None, data.input_size
        if data.vocabulary_size:
            input_size = model.embedding_size
            self.embedding = nn.Embedding.from_pretrained(data.embeddings(input_size), freeze=False)
        self.rnn = Recurrent(
            model.cell,
            model.policy,
            input_size,
            model.hidden_size,
            model.num_layers,
            learn_initial_state=model.learn_initial_state,
            p_skip=model.p_skip,
            engine=engine,
            batch_first=True,
        )
        self.dropout = nn.Dropout(model.dropout)
        self.readout = nn.Linear(model.hidden_size, data.outputs)
        nn.init.xavier_uniform_(self.readout.weight)  # tf.contrib.layers.linear
        nn.init.zeros_(self.readout.bias)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, T, I), or token ids (B, T) -> prediction (B, C), updates (B, T) or (B, T, H)."""
        _, state, updates = self.rnn(self.embed(x), lengths=lengths)
        return self.read(state), updates

    def embed(self, x: Tensor) -> Tensor:
        """What the recurrent network reads, (B, T, I)."""
        return x if self.embedding is None else self.embedding(x)

    def read(self, state: Tensor | tuple[Tensor, ...]) -> Tensor:
        """The prediction (B, C) from the last state."""
        h = state if isinstance(state, Tensor) else state[0]
        return self.readout(self.dropout(h[-1]))
