"""Pruning and steering of vision-language models. Importing this needs torch only; each name loads on first use."""

from vision_attn._lazy import lazily

# Public name -> the module of this folder that defines it.
_PUBLIC = {
    # attaching
    "attach": "attachment",
    "load": "loading",
    "FAMILIES": "families",
    "prefill_flops": "report",
    "kv_bytes": "report",
    # dropping visual tokens: before the text model, inside it, from the cache
    "RandomPrune": "methods.baselines",
    "UniformPrune": "methods.baselines",
    "FasterVLM": "methods.fastervlm",
    "VTCCLS": "methods.vtccls",
    "HoloV": "methods.holov",
    "VisionZip": "methods.visionzip",
    "DivPrune": "methods.divprune",
    "CDPruner": "methods.cdpruner",
    "VisPruner": "methods.vispruner",
    "PruMerge": "methods.prumerge",
    "PruMergePlus": "methods.prumerge",
    "FastV": "methods.fastv",
    "PyramidDrop": "methods.pyramiddrop",
    "SparseVLM": "methods.sparsevlm",
    "DART": "methods.dart",
    "TokenSchedule": "methods.schedule",
    "search_schedule": "schedules",
    "VisualExit": "methods.visualexit",
    "ExitRouters": "exits",
    "fit_exit": "exits",
    "KVPrune": "methods.kvprune",
    "StreamingHeads": "methods.streamingheads",
    "TaskKV": "methods.taskkv",
    "ZipVL": "methods.zipvl",
    # attention: patterns, edits of rows, gains of heads
    "NeighborVisualAttention": "methods.neighborvisual",
    "VisualBlockPattern": "methods.visualblocks",
    "VisualHeadMask": "methods.visualheadmask",
    "PAI": "methods.pai",
    "PAINT": "methods.paint",
    "GIFT": "methods.gift",
    "VAR": "methods.var",
    "SINK_DIMS": "methods.var",
    "find_sinks": "methods.var",
    "VHR": "methods.vhr",
    "vhd": "methods.vhr",
    "t_vhd": "methods.vhr",
    "ACT": "methods.act",
    "fit_act": "methods.act",
    "ZeroTuning": "methods.zerotuning",
    "search_gamma": "methods.zerotuning",
    "answer_entropy": "methods.zerotuning",
    # the choice of the next token
    "VCD": "methods.vcd",
    "ICD": "methods.icd",
    "M3ID": "methods.m3id",
    "DAMRO": "methods.damro",
    "AGLA": "methods.agla",
    "DoLa": "methods.dola",
    "OperaPenalty": "methods.opera",
    # looking at attention, and a second look
    "Capture": "maps",
    "mass": "maps",
    "image_entropy": "maps",
    "sink_tokens": "maps",
    "rollout": "flow",
    "attention_flow": "flow",
    "points": "regions",
    "grids": "grids",
    "CARVE": "carve",
    # scores
    "pope_questions": "metrics",
    "says_yes": "metrics",
    "yes_no_scores": "metrics",
    "margin_area": "metrics",
    "mme_scores": "metrics",
    "Chair": "mentions",
    "Amber": "mentions",
    "amber_answers": "mentions",
    "preference_pair": "sentinel",
}

__all__ = list(_PUBLIC)


__getattr__ = lazily(__name__, _PUBLIC)
