"""The commands of infini-train with their help texts. Launchers read this module too, so it imports nothing."""

COMMANDS = {
    "prepare": "turn text into a tokenizer and shards",
    "pretrain": "train, or go on from the newest checkpoint of the run directory",
    "evaluate": "held-out perplexity by position, with memory and without; passkey: retrieval by length and depth; or compare",
    "generate": "continue a prompt with streaming inference",
    "report": "write report.html of a run directory",
    "checkpoint": "list, verify, inspect or consolidate checkpoints",
    "convert": "a Llama of Hugging Face transformers to start from, or trained weights for transformers",
    "plan": "what a run takes on so many GPUs, before they are asked for",
    "submit": "hand a run to SLURM",
    "status": "what a run and its job do",
    "cancel": "end the job of a run, after a checkpoint",
    "logs": "what the job of a run prints",
}
