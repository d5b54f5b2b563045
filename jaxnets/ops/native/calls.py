"""Calling the kernels."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxnets.errors import UserError


def nothing():
    """The empty array that a kernel is given for an operand that it does without."""
    return jnp.zeros((0,), jnp.float32)


def attributes_of(bounds, prefix=""):
    """`(low, high)` as a kernel's attributes, with a prefix if it calls them `output_low` and so on."""
    return {f"{prefix}low": np.float32(bounds[0]), f"{prefix}high": np.float32(bounds[1])}


def call(name, shapes, *args, aliases=None, **attributes):
    """Run a kernel with float32 results of these shapes; sequentially under vmap."""
    results = [_result(shape, args[0]) for shape in shapes]

    @jax.custom_jvp
    def kernel(*args):
        function = jax.ffi.ffi_call(f"jaxnets_{name}", results, vmap_method="sequential", input_output_aliases=aliases)
        return function(*args, **attributes)

    @kernel.defjvp
    def no_jvp(primals, tangents):
        raise UserError("the native operators have first derivatives only: use JAXNETS_OPS=xla for the second")

    return kernel(*args)


def _result(shape, like):
    """Inside shard_map a result varies over the mesh as the arguments do."""
    aval = jax.typeof(like)
    if hasattr(aval, "vma"):  # renamed within JAX 0.10
        return jax.ShapeDtypeStruct(shape, jnp.float32, vma=aval.vma)
    if not aval.manual_axis_type.varying:
        return jax.ShapeDtypeStruct(shape, jnp.float32)
    sharding = NamedSharding(jax.sharding.get_abstract_mesh(), PartitionSpec())
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding, manual_axis_type=aval.manual_axis_type)
