// What vec.h needs of vectors, for compilers without GCC's and Clang's vector types: plain loops, which they vectorize as they can.
#pragma once

namespace {

template <class T>
struct Lanes {
    T x[W];
    T &operator[](int i) { return x[i]; }
    T operator[](int i) const { return x[i]; }
    template <class U>
    explicit operator Lanes<U>() const {  // the same bits
        static_assert(sizeof(T) == sizeof(U), "lanes of one size");
        Lanes<U> out;
        memcpy(&out, this, sizeof out);
        return out;
    }
};

template <class T>
using Number = std::enable_if_t<std::is_arithmetic<T>::value>;

template <class T>
Lanes<T> filled(T one) {
    Lanes<T> out;
    for (int i = 0; i < W; i++) out.x[i] = one;
    return out;
}

#define KVLOOM_OPERATOR(op)                                                   \
    template <class T>                                                        \
    Lanes<T> operator op(const Lanes<T> &a, const Lanes<T> &b) {              \
        Lanes<T> out;                                                         \
        for (int i = 0; i < W; i++) out.x[i] = T(a.x[i] op b.x[i]);           \
        return out;                                                           \
    }                                                                         \
    template <class T, class S, class = Number<S>>                            \
    Lanes<T> operator op(const Lanes<T> &a, S b) {                            \
        return a op filled(T(b));                                             \
    }                                                                         \
    template <class T, class S, class = Number<S>>                            \
    Lanes<T> operator op(S a, const Lanes<T> &b) {                            \
        return filled(T(a)) op b;                                             \
    }                                                                         \
    template <class T, class S>                                               \
    Lanes<T> &operator op##=(Lanes<T> &a, const S &b) {                       \
        return a = a op b;                                                    \
    }
KVLOOM_OPERATOR(+)
KVLOOM_OPERATOR(-)
KVLOOM_OPERATOR(*)
KVLOOM_OPERATOR(/)
KVLOOM_OPERATOR(&)
KVLOOM_OPERATOR(|)
KVLOOM_OPERATOR(<<)
KVLOOM_OPERATOR(>>)
#undef KVLOOM_OPERATOR

template <class T>
Lanes<T> operator-(const Lanes<T> &a) {
    Lanes<T> out;
    for (int i = 0; i < W; i++) out.x[i] = -a.x[i];
    return out;
}

// Masks: all bits of a lane.
inline Lanes<int32_t> operator>(const Lanes<float> &a, const Lanes<float> &b) {
    Lanes<int32_t> out;
    for (int i = 0; i < W; i++) out.x[i] = a.x[i] > b.x[i] ? -1 : 0;
    return out;
}
inline Lanes<int32_t> operator<(const Lanes<float> &a, float b) { return filled(b) > a; }

typedef Lanes<float> vf;
typedef Lanes<int32_t> vi;
typedef Lanes<uint32_t> vu;
typedef Lanes<uint16_t> vh;
typedef Lanes<uint8_t> vb;

template <class T>
Lanes<T> at(const T *p) {
    Lanes<T> out;
    memcpy(&out, p, sizeof out);
    return out;
}
template <class T>
void to(void *p, const Lanes<T> &x) {
    memcpy(p, &x, sizeof x);
}

template <class V, class T>
V converted(const Lanes<T> &from) {
    V out;
    for (int i = 0; i < W; i++) out.x[i] = static_cast<std::remove_reference_t<decltype(out.x[i])>>(from.x[i]);
    return out;
}

inline vf select(const vi &mask, const vf &a, const vf &b) {
    vf out;
    for (int i = 0; i < W; i++) out.x[i] = mask.x[i] ? a.x[i] : b.x[i];
    return out;
}

inline void prefetch(const void *) {}

}  // namespace
