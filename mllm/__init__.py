"""Pruning and steering of vision-language models. Importing this needs torch only; each name loads on first use."""

from vision_attn._lazy import lazily

# Public name -> the module of this folder that defines it.
_PUBLIC = {
    "attach": "attachment",
    "prefill_flops": "report",
    "kv_bytes": "report",
    "FAMILIES": "families",
    "load": "loading",
    "pope_questions": "metrics",
    "says_yes": "metrics",
    "yes_no_scores": "metrics",
    "margin_area": "metrics",
    "mme_scores": "metrics",
    "Chair": "mentions",
    "Amber": "mentions",
    "amber_answers": "mentions",
    "preference_pair": "sentinel",
    "grids": "grids",
    "Capture": "maps",
    "mass": "maps",
    "image_entropy": "maps",
    "rollout": "flow",
    "attention_flow": "flow",
    "points": "regions",
    "CARVE": "carve",
    "DAMRO": "methods.damro",
    "FasterVLM": "methods.fastervlm",
    "FastV": "methods.fastv",
    "fit_exit": "exits",
    "ExitRouters": "exits",
    "VisualExit": "methods.visualexit",
    "search_schedule": "schedules",
    "TokenSchedule": "methods.schedule",
    "DART": "methods.dart",
    "SparseVLM": "methods.sparsevlm",
    "PyramidDrop": "methods.pyramiddrop",
    "ICD": "methods.icd",
    "KVPrune": "methods.kvprune",
    "M3ID": "methods.m3id",
    "PAI": "methods.pai",
    "RandomPrune": "methods.baselines",
    "StreamingHeads": "methods.streamingheads",
    "TaskKV": "methods.taskkv",
    "UniformPrune": "methods.baselines",
    "CDPruner": "methods.cdpruner",
    "DivPrune": "methods.divprune",
    "HoloV": "methods.holov",
    "PruMerge": "methods.prumerge",
    "PruMergePlus": "methods.prumerge",
    "VisionZip": "methods.visionzip",
    "VisPruner": "methods.vispruner",
    "VCD": "methods.vcd",
    "VTCCLS": "methods.vtccls",
    "ZipVL": "methods.zipvl",
    "ZeroTuning": "methods.zerotuning",
}

__all__ = list(_PUBLIC)


__getattr__ = lazily(__name__, _PUBLIC)
