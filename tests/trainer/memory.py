"""What a forward really keeps, to hold the estimate of memory against."""

import torch


def kept_for_backward(trainer, conditioning, sample, level):
    """Bytes that a forward with gradients keeps, weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in trainer.denoiser.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # the tensor too: or another may get its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), trainer.forward_context(conditioning):
        trainer.predict(sample, level, conditioning)
    return sum(size for size, _ in kept.values())
