"""Small .gguf files, written by the `gguf` package as llama.cpp's converter does it, and what they hold."""

import json

import gguf
import torch
from gguf.quants import dequantize, quantize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTROL, NORMAL = 3, 1
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
TEXTS = ["12 pens and  30 more\n\n5  apples", "a train drives  80 km an hour\n\n3 hours"] * 4


def digit_tokenizer() -> PreTrainedTokenizerFast:
    """Splits as SmolLM2's does: each digit apart, then as GPT-2; runs of spaces are merged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )


def tied_llama(vocabulary: int, **changes) -> LlamaForCausalLM:
    """A random Llama of 2 layers whose rows have whole blocks of 32 values."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": vocabulary, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0, "initializer_range": 0.2, "tie_word_embeddings": True, **changes,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    return model


def write_gguf(path, model, tokenizer, *, pre="smollm", architecture="llama", metadata=None, drop=(), extra=None):
    """Write `model` with its matrices in blocks of 4 bits (Q4_1), and put the rounded values into `model` itself.

    Args:
        metadata: further keys, or other values.
        drop: tensors that are left out.
        extra: further tensors.
    """
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, architecture)
    # 1. the model
    writer.add_name("A title, and no path")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    # 2. the tokenizer
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    special = {token["content"] for token in content["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if token in special else NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for key, value in (metadata or {}).items():
        kind = gguf.GGUFValueType.get_type(value)
        writer.add_key_value(key, value, gguf.GGUFValueType.UINT32 if kind == gguf.GGUFValueType.INT32 else kind)
    # 3. the weights
    tensors = {
        name: value for name, value in state.items() if name != "lm_head.weight" or not config.tie_word_embeddings
    }
    for name, value in {**tensors, **(extra or {})}.items():
        if (called := gguf_name(name)) not in drop:
            put(writer, called, value, heads_of(called, config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name):
    if name.startswith("model.layers."):
        _, _, number, rest = name.split(".", 3)
        module, kind = rest.rsplit(".", 1)
        return f"blk.{number}.{NAMES[module]}.{kind}"
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    module, _, kind = name.rpartition(".")
    return f"{whole[module]}.{kind}" if module in whole else name


def heads_of(name, config):
    return {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2])


def put(writer, name, value, heads):
    """Add a tensor; its values become the rounded ones. llama.cpp interleaves the halves of each query and key head."""
    array = value.detach().numpy()
    if array.ndim == 1:
        writer.add_tensor(name, array.copy())
        return
    kind = gguf.GGMLQuantizationType.Q4_1 if name != "token_embd.weight" else gguf.GGMLQuantizationType.Q8_0
    blocks = quantize(array, kind)
    value.data.copy_(torch.from_numpy(dequantize(blocks, kind)))
    if heads is not None:
        blocks = blocks.reshape(heads, 2, blocks.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(blocks.shape)
    writer.add_tensor(name, blocks, raw_dtype=kind)
