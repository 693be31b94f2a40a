// All kernels of one instruction set. Included into isa_*.cpp inside an anonymous namespace, last.

inline Scaling int8_scaling(uint32_t amax) {
    const RowScale s = row_scale(amax);
    return {s.scale, s.factor};
}

template <class Isa>
constexpr Kernels kernels_of(const char* name) {
    Kernels k = {};
    k.name = name;
    k.code_bytes = sizeof(typename Isa::Code);
    k.int8_products = Isa::kProducts;
    k.float_products = Isa::kFloatProducts;
    k.quantize = quantize<Isa>;
    k.quantize_staged = quantize_staged<Isa>;
    k.quantize_static = quantize_static<Isa>;
    k.stage = stage<Isa>;
    k.prepare = prepare<Isa>;
    k.widen = widen<Isa>;
    k.int8_product = int8_product<Isa>;
    k.fake_quantize = fake_quantize<Isa>;
    k.fake_quantize_piece = fake_quantize_piece<Isa>;
    k.fake_quantize_static = fake_quantize_static<Isa>;
    k.amax = largest_bits<Isa>;
    k.narrow = narrow<Isa>;
    k.rotary = rotary<Isa>;
    k.int8_scaling = int8_scaling;
    k.patches = patch_kernels_of<Isa>();
    k.coded = coded_kernels_of<Isa>();
    if constexpr (Isa::kMultipliesDigits) {
        k.quantize_digits = quantize_digits<Isa>;
    } else {
        k.float_product = float_product<Isa>;
    }
    k.attention = attention<Isa>;
    return k;
}
