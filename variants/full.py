import attngen as ag


class Full(ag.Variant):
    """Every query attends to every key: o = softmax(q k^T * scale) v.

    Source: Vaswani et al. 2017, "Attention Is All You Need", eq. 1; encoders and cross-attention. ``scale`` defaults to
    head_dim ** -0.5 and is an argument of the call.
    """
