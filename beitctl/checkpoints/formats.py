"""The formats of other libraries, in the order in which they are tried."""

from beitctl.checkpoints.mapping import Format
from beitctl.checkpoints.timm import BEIT, BEIT3, VIT
from beitctl.checkpoints.transformers import TransformersBeit
from beitctl.checkpoints.unilm_beit import UnilmBeit
from beitctl.checkpoints.unilm_beit3 import UnilmBeit3
from beitctl.checkpoints.unilm_vlmo import UnilmVlmo

FORMATS: tuple[Format, ...] = (UnilmBeit3(), UnilmVlmo(), TransformersBeit(), UnilmBeit(), BEIT, BEIT3, VIT)
