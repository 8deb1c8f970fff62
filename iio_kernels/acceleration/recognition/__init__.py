"""Finds slot attention in a graph of torch's functions, however it is spelt.

`reader.Reader` goes through a graph once. For each tensor it keeps its axes, and what it is in terms of slot attention
(`terms`):

    Leaf            any tensor, times a number; a linear map of another, if it is one
    Constant        one number everywhere
    Indicator       a boolean tensor as numbers, 0 and 1
    Product         a * b, broadcast against each other and not summed yet
    Logits          a product of two leaves summed over the axes that they share, masked, biased, or several in a row
    Attention       the softmax of logits over all axes that only one of them, the queries, has; plus eps
    Total           attention summed over the axes that only the other, the keys, has; plus eps, bounded from below
    Inverse         1 / Total
    Weights         Attention / Total
    Update          Attention or Weights times a leaf, the values, summed over the keys' axes: what to replace

and of a softmax that is written out

    Detached        logits without their gradient
    Largest         logits' maximum over some axes
    Exponential     exp(logits), perhaps less a maximum
    Sum             an Exponential summed over some axes, or its logarithm
    LogAttention    the logarithm of a softmax

The rules stand by subject: `views`, `parts`, `numbers`, `masks`, `softmaxes`, `arithmetic`, `sums`, `products`.

Axes are followed through every reshape and transposition (`axes`). So the order of dimensions, the names of subscripts,
heads split off or joined, and which of `einsum`, `matmul`, `bmm` or a sum of products is written make no difference.
Anything not known here makes a new leaf, and so ends in no update rather than in a wrong one.
"""
