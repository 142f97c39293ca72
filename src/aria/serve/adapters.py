"""Loading and unloading of adapters at run time, by vLLM's routes."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from aria.serve import field_rules
from aria.serve.errors import ApiError
from aria.serve.protocol_base import Body
from aria.serve.service import Service

Name = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f]+$")]


class LoadAdapterRequest(Body):
    """Body of ``POST /v1/load_lora_adapter``."""

    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    """A folder on the server or a Hub repository, in PEFT's format."""
    load_inplace: bool = False
    """Whether to replace an adapter of the same name."""
    known: ClassVar[field_rules.FieldRules] = field_rules.LOAD_ADAPTER


class UnloadAdapterRequest(Body):
    """Body of ``POST /v1/unload_lora_adapter``."""

    lora_name: Name
    known: ClassVar[field_rules.FieldRules] = field_rules.UNLOAD_ADAPTER


async def load(service: Service, body: LoadAdapterRequest) -> str:
    """Load an adapter, which requests may then select by name.

    Raises:
        ApiError: 400, the name is taken or the adapter does not fit the model; 404, no such folder or repository.
    """
    name = body.lora_name
    if name in service.settings.model_names:
        raise ApiError(400, f"{name!r} is the name of the model; choose another for the adapter", param="lora_name")
    async with service.adapters_lock:
        if service.adapter(name) is not None and not body.load_inplace:
            message = f"The lora adapter {name!r} has already been loaded; set load_inplace to replace it"
            raise ApiError(400, message, param="lora_name", code="adapter_exists")
        try:
            await service.engine.add_adapter(name, body.lora_path)
        except FileNotFoundError as error:
            raise ApiError(404, str(error), param="lora_path", code="adapter_not_found") from error
        except (ValueError, OSError) as error:
            raise ApiError(400, str(error), param="lora_path", code="invalid_adapter") from error
    return f"Success: LoRA adapter {name!r} added successfully."


async def unload(service: Service, body: UnloadAdapterRequest) -> str:
    """Unload an adapter; requests that use it are still finished.

    Raises:
        ApiError: 404, no such adapter.
    """
    name = body.lora_name
    async with service.adapters_lock:
        if service.adapter(name) is None:
            message = f"The lora adapter {name!r} cannot be found."
            raise ApiError(404, message, param="lora_name", code="adapter_not_found")
        await service.engine.remove_adapter(name)
    return f"Success: LoRA adapter {name!r} removed successfully."
