"""The model: a plain nn.TransformerEncoder with its defaults, which knows nothing of optimal transport."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from examples.common.files import read_file

from .data import LONGEST, TOKENS

CHECKPOINT = Path(__file__).parent / "softmax_encoder.pt"
WIDTH, HEADS, LAYERS, HIDDEN, DROPOUT = 48, 4, 3, 96, 0.1


class FamilyClassifier(nn.Module):
    """Which family a crop belongs to, read off the token that opens it.

    batch_first, post-norm, ReLU and nested tensors allowed: in evaluation, without gradients, nn.TransformerEncoder
    then packs a padded batch into nested tensors and runs each layer as one fused softmax operator.
    """

    def __init__(self, families: int) -> None:
        super().__init__()
        self.token = nn.Embedding(TOKENS, WIDTH)
        self.position = nn.Embedding(LONGEST + 1, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, DROPOUT, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS)
        self.head = nn.Linear(WIDTH, families)

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens [N, L] to the encoder's input [N, L, WIDTH]."""
        return self.token(tokens) + self.position.weight[: tokens.shape[1]]

    def forward(self, tokens: Tensor, padding: Tensor) -> Tensor:
        """Logits [N, families] of tokens [N, L]; padding [N, L] is True where there is no token."""
        states = self.encoder(self.embed(tokens), src_key_padding_mask=padding)
        return self.head(states[:, 0])


def load_model(path: str | Path, families: int) -> FamilyClassifier:
    """The model of a checkpoint, which is a state_dict; nothing in the file is executed (``weights_only``).

    Raises:
        FileNotFoundError: no file there.
        ValueError: the file is not a checkpoint of this model.
    """
    path = Path(path)
    state = read_file(path)
    model = FamilyClassifier(families)
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not hold the weights of this example's model") from error
    return model
