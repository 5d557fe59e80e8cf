"""Files of the Hugging Face hub, through its own library and cache.

`HF_ENDPOINT` names another server, as it does for `huggingface_hub` itself.
"""

import os
from pathlib import Path

from rekindle.errors import UserError


def download(
    repo: str, file: str, *, instead: str, kind: str = "model", revision: str = "main"
) -> Path:
    """The local path of `file` in a repository of the hub, from the cache or the network.

    `kind` is model or dataset. Raises `UserError` that names the file and says with `instead` how
    to do without the network.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # one line of ours instead of one for each retry
    endpoint = os.environ.get("HF_ENDPOINT")
    try:
        return Path(hf_hub_download(repo, file, repo_type=kind, revision=revision,
                                    endpoint=endpoint))  # fmt: skip
    except Exception as error:  # the library lets through what its HTTP client raises
        raise UserError(
            f"could not download {file} of {kind} {repo} from the hub ({type(error).__name__}): "
            f"check the network, or {instead}"
        ) from None
