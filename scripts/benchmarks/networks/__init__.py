"""Networks that are not torchvision's own, in the manner in which strangers write them: one file a field."""

from networks import detection, hugging_face, others, sequences, timm_zoo, vision
from networks.stranger import Stranger

ALL: list[Stranger] = [s for field in (timm_zoo, hugging_face, detection, vision, sequences, others) for s in field.strangers()]
