def is_secret(name):
    return any(w in name for w in ("TOKEN", "SECRET", "PASSWORD", "API_KEY"))


def read_environment(name):
    return {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}
